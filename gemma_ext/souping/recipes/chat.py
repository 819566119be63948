"""Chat templates: the formats that recipes know by name, and the one that most models share.

The formats are those that the models of each family were trained on; the texts are written for
this project.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

_SYSTEM_FIRST = """\
{%- if messages and messages[0].role == 'system' -%}
  {%- set system, turns = messages[0].content | trim, messages[1:] -%}
{%- else -%}
  {%- set system, turns = '', messages -%}
{%- endif -%}
"""

TEMPLATES = {
    "chatml": """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
""",
    "alpaca": _SYSTEM_FIRST
    + """\
{%- if system -%}{{ system + '\\n\\n' }}{%- endif -%}
{%- for message in turns -%}
  {%- if message.role == 'user' -%}
{{ '### Instruction:\\n' + message.content | trim + '\\n\\n' }}
  {%- else -%}
{{ '### Response:\\n' + message.content | trim + eos_token + '\\n\\n' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}
""",
    "llama3": """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim }}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
""",
    "mistral": _SYSTEM_FIRST
    + """\
{{- bos_token -}}
{%- for message in turns -%}
  {%- if message.role == 'user' -%}
    {%- set lead = system + '\\n\\n' if system and loop.first else '' -%}
{{ '[INST] ' + lead + message.content | trim + ' [/INST]' }}
  {%- else -%}
{{ ' ' + message.content | trim + eos_token }}
  {%- endif -%}
{%- endfor -%}
""",
    "exaone": """\
{%- if not messages or messages[0].role != 'system' -%}
{{ '[|system|][|endofturn|]\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '[|' + message.role + '|]' + message.content | trim }}
{{- '\\n' if message.role == 'user' else '[|endofturn|]\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '[|assistant|]' }}{%- endif -%}
""",
}


def choose_template(wanted: str | None, templates: Sequence[str | None]) -> str | None:
    """The template of the output; None to leave that of its tokenizer.

    Args:
        wanted: as in a recipe: None, "auto", a name of TEMPLATES or Jinja.
        templates: of the models, the base first; "auto" takes the one that most of them have, and
            the earlier of two that are as frequent.
    """
    if wanted is None:
        return None
    if wanted == "auto":
        counts = Counter(template for template in templates if template)
        return max(counts, key=counts.__getitem__, default=None)
    return TEMPLATES.get(wanted, wanted)
