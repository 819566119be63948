"""The loader in fresh processes: one copy only, the linker's own words, a silent import."""

import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch

from gemma_ext import _loader

IMPORT_AND_REPORT = """
try:
    import gemma_ext
except ImportError as error:
    print("ImportError:", error)
"""


def test_load_twice_is_the_same_library():
    assert _loader.load() is _loader.load()


def test_reloaded_module_accepts_the_library_it_finds(python):
    code = """
    import sys
    import gemma_ext
    from gemma_ext import _loader
    del sys.modules["gemma_ext._loader"]
    from importlib import import_module
    again = import_module("gemma_ext._loader")
    assert again is not _loader
    print(again.load().path == _loader.load().path)
    """
    done = python(textwrap.dedent(code))
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_second_copy_is_refused_and_nothing_aborts(python, root, tmp_path):
    shutil.copytree(root / "gemma_ext", tmp_path / "copy" / "gemma_ext")
    code = f"""
    import sys
    import gemma_ext
    for name in [n for n in sys.modules if n.split(".")[0] == "gemma_ext"]:
        del sys.modules[name]
    sys.path.insert(0, {str(tmp_path / "copy")!r})
    {textwrap.indent(IMPORT_AND_REPORT, "    ").strip()}
    """
    done = python(textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    assert "ImportError: the operators of gemma_ext are already in this process" in done.stdout
    assert str(root / "gemma_ext" / "_C.so") in done.stdout
    assert str(tmp_path / "copy" / "gemma_ext" / "_C.so") in done.stdout


def test_library_loaded_by_hand_is_refused(python, root, tmp_path):
    copy = shutil.copy(root / "gemma_ext" / "_C.so", tmp_path)
    done = python(f"import torch; torch.ops.load_library({copy!r})\n{IMPORT_AND_REPORT}")
    assert done.returncode == 0, done.stderr
    assert "already in this process" in done.stdout


def test_missing_library_names_the_file_and_the_remedy(python, tmp_path):
    done = python(IMPORT_AND_REPORT, GEMMA_EXT_LIB_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"the op library is missing: expected {tmp_path / '_C.so'}" in done.stdout
    assert "make build" in done.stdout


def test_unresolved_symbol_keeps_the_linkers_text(python, tmp_path):
    (tmp_path / "broken.c").write_text(
        "int absent_function(void); int call(void) { return absent_function(); }"
    )
    command = ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "_C.so"), str(tmp_path / "broken.c")]
    subprocess.run(command, check=True)
    done = python(IMPORT_AND_REPORT, GEMMA_EXT_LIB_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "undefined symbol: absent_function" in done.stdout
    assert f"torch {torch.__version__} is installed" in done.stdout


def test_file_that_is_no_library_keeps_the_linkers_text(python, tmp_path):
    (tmp_path / "_C.so").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 40)
    done = python(IMPORT_AND_REPORT, GEMMA_EXT_LIB_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "invalid ELF header" in done.stdout


def test_truncated_library_is_named_before_it_is_mapped(python, root, tmp_path):
    whole = (root / "gemma_ext" / "_C.so").read_bytes()
    (tmp_path / "_C.so").write_bytes(whole[: len(whole) // 2])
    done = python(IMPORT_AND_REPORT, GEMMA_EXT_LIB_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "_C.so is truncated: build or install it again" in done.stdout


def test_op_that_an_older_library_lacks_is_named_with_the_remedy():
    with pytest.raises(ImportError, match=r"no sae_of_tomorrow: .*build it again"):
        _loader.find_op("sae_of_tomorrow")


def test_old_torch_is_named(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(ImportError, match=r"needs torch >= 2\.10, got 2\.9\.1"):
        _loader._load_library(Path("unused"))


def test_import_is_silent_and_quick(python):
    code = """
    import time
    import torch
    start = time.perf_counter()
    import gemma_ext
    assert time.perf_counter() - start < 1.5
    """
    done = python(textwrap.dedent(code))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_info_lists_every_operator(capsys):
    from gemma_ext import info

    info.main()
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert str(_loader.load().path) in printed
    for name in info.operators():
        assert name in printed


def test_info_as_module_and_as_command_agree(python):
    module = python("import runpy; runpy.run_module('gemma_ext.info', run_name='__main__')")
    command = python("import sys; sys.argv[1:] = ['info']; from gemma_ext.cli import main; main()")
    assert module.returncode == command.returncode == 0, module.stderr + command.stderr
    assert module.stdout == command.stdout


def test_the_version_as_a_command(monkeypatch, capsys):
    from gemma_ext import __version__, cli

    monkeypatch.setattr("sys.argv", ["gemma-ext", "--version"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert capsys.readouterr().out == f"gemma_ext {__version__}\n"
