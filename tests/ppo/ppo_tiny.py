"""A Gemma-2 of a few thousand parameters with soft-caps, its tokenizer of words, and trainers."""

import torch

from gemma_ext.nn.ppo import Sequences
from gemma_ext.ppo import PPOConfig, PPOTrainer, Rollout

V, D, PAD, END, BOS = 61, 24, 0, 1, 2
PROMPTS = [f"w{a} w{b} w{c}" for a, b, c in ((3, 4, 5), (6, 7, 8), (9, 9, 9), (10, 11, 3))] + [
    "w12"
]


def tiny_model(seed=0, vocabulary=V, kind="Gemma2ForCausalLM", **changed):
    import transformers

    torch.manual_seed(seed)
    config = transformers.Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=D,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=128,
        sliding_window=8,
        final_logit_softcapping=3.0,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=BOS,
        attn_implementation="eager",
        **changed,
    )
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<bos>", *(f"w{i}" for i in range(3, V))]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )


def adapted(model, *more, dropout=0.0):
    """Adapters that do something, as those that were trained do."""
    from peft import LoraConfig

    from gemma_ext.nn.ppo import with_adapters

    targets = ["q_proj", "v_proj", "down_proj"]
    made = with_adapters(
        model, LoraConfig(r=2, target_modules=targets, lora_dropout=dropout), *more
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


def random_sequences(rows=5, prompt=6, response=7, seed=0, vocabulary=V):
    """Prompts of 1 to `prompt` tokens and responses of `response` tokens down to 1."""
    stream = torch.Generator().manual_seed(seed)
    prompts = torch.randint(3, vocabulary, (rows, prompt), generator=stream)
    given = 1 + torch.arange(rows) % prompt
    mask = (torch.arange(prompt) >= prompt - given.unsqueeze(1)).long()
    responses = torch.randint(3, vocabulary, (rows, response), generator=stream)
    lengths = response - torch.arange(rows) % response
    for row, length in enumerate(lengths):
        if length < response:
            responses[row, length - 1] = END
    return Sequences.build(prompts * mask, mask, responses, [END], pad=PAD)


def count_words(word="w7"):
    def reward(completions, **columns):
        return [float(text.split().count(word)) for text in completions]

    return reward


def config(folder, **changed):
    defaults = {
        "output_dir": folder,
        "total_episodes": 32,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "response_length": 6,
        "temperature": 0.9,
        "learning_rate": 1e-2,
        "kl_coef": 0.02,
        "save_steps": 100,
        "sample_prompts": 0,
    }
    return PPOConfig(**{**defaults, **changed})


def trainer(folder, policy=None, rewards=None, *, value=None, changed=None, **arguments):
    return PPOTrainer(
        config(folder, **(changed or {})),
        tiny_model() if policy is None else policy,
        rewards=rewards or count_words(),
        prompts=arguments.pop("prompts", PROMPTS),
        value=value,
        tokenizer=tokenizer(),
        show_progress=False,
        **arguments,
    )


def fixed(sequences):
    """A sampler that always answers with the same sequences."""

    def sampler(policy, prompts, seeds, *, greedy=False):
        return Rollout(sequences, None)

    return sampler
