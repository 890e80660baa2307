"""The command line: what it prints, what it exits with."""

import subprocess
import sys

import pytest
from image_files import write_images

import sasa
import sasa_command
from sasa.cli import COMMANDS, main
from sasa.ops import cpu, cpu_library
from sasa.ops.implementations import IMPLEMENTATIONS, Implementation
from sasa_command.__main__ import texts


def test_info_names_versions_implementations_and_threads(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for expected in (sasa.__version__, "torch", "timm", "threads", "eager      plain PyTorch"):
        assert expected in printed


def compiled_kernels_in(printed: str) -> str:
    return next(line.split(maxsplit=2)[2] for line in printed.splitlines() if line.startswith("compiled kernels"))


def test_info_tells_the_instruction_sets_of_the_compiled_kernels(capsys, monkeypatch):
    monkeypatch.setattr(cpu_library, "_chosen", 0)
    main(["info"])
    assert compiled_kernels_in(capsys.readouterr().out) == f"default (of {', '.join(cpu.capabilities())})"


def test_info_tells_why_there_are_no_compiled_kernels(capsys, monkeypatch):
    monkeypatch.setattr(cpu, "why_missing", lambda: "no compiler")
    main(["info"])
    assert compiled_kernels_in(capsys.readouterr().out) == "no: no compiler"


def test_info_tells_of_an_unknown_instruction_set(capsys, monkeypatch):
    monkeypatch.setattr(cpu_library, "_chosen", None)
    monkeypatch.setenv("SASA_CPU_CAPABILITY", "avx1024")
    assert main(["info"]) == 0
    assert "SASA_CPU_CAPABILITY: expected one of 'default'" in compiled_kernels_in(capsys.readouterr().out)


def test_info_lists_first_what_this_machine_has(capsys, monkeypatch):
    missing = Implementation("fast", "other machines only", None, None, lambda *call: "no such device", bool)
    monkeypatch.setattr("sasa.cli.IMPLEMENTATIONS", (missing, *IMPLEMENTATIONS))
    main(["info"])
    listed = capsys.readouterr().out.partition("fastest first:")[2].split("\n")
    there = ["(not here: " not in line for line in listed if line]
    assert there == sorted(there, reverse=True) and not there[-1]
    assert any("other machines only (not here: no such device)" in line for line in listed)


def test_help_lists_the_commands(capsys):
    assert main([]) == main(["--help"]) == 0
    assert "train a network on images" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == sasa.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["trian"],
            f"sasa: error: expected one of {', '.join(COMMANDS)}, got 'trian'",
        ),
        (["info", "--all"], "takes no options, got --all"),
        (["tables", "--all"], "sasa tables: error: unrecognized arguments: --all"),
        (["train", "--data", "nowhere"], "sasa train: error: data: expected a folder, got nowhere"),
        (["train", "--model=vgg"], "sasa train: error: model: expected one of sasa_resnet14"),
    ],
)
def test_mistakes_exit_with_2_and_a_message(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "named"), [(["--epochs", "few"], "epochs"), (["--epoch-count", "3"], "epoch")])
def test_options_are_validated(arguments, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", *arguments])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_train_from_the_command_line_and_a_config_file(tmp_path, capsys):
    write_images(tmp_path / "images")
    (tmp_path / "images" / "cat" / "0.png").write_bytes(b"broken")
    config = tmp_path / "recipe.yaml"
    config.write_text(f"model: resnet14\ndata: {tmp_path / 'images'}\nepochs: 7\nimage_size: 8\n")
    common = ["train", "--config", str(config), "--epochs", "1", "--batch-size", "4", "--out"]
    assert main([*common, str(tmp_path / "refused"), "--strict"]) == 2
    assert "1 of 10 images can't be read" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="skipped an image"):
        assert main([*common, str(tmp_path / "run"), "--augment", "none"]) == 0
    assert "resnet14: top-1" in capsys.readouterr().out
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_bare_train_prints_typical_commands_and_trains_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train"]) == 2
    printed = capsys.readouterr()
    assert "sasa train --config demo --out" in printed.err and not printed.out
    assert not list(tmp_path.iterdir())


HEAVY = ("lightning", "pytorch_lightning", "timm", "torchvision", "matplotlib", "torchmetrics", "scipy", "datasets")
CALLS = [["--version"], ["train"], *([command, "--help"] for command in ("train", "eval", "predict", "demo", "tables"))]
CALLS += [["train", "--lerning-rate", "1"], ["train", "--config", "nowhere"], ["predict", "x", "--batch", "1"]]


def test_help_and_mistakes_need_nothing_heavy():
    program = f"""
import contextlib, io, sys
from sasa.cli import main
import sasa.train.recipe
for arguments in {CALLS!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            main(arguments)
    found = [name for name in {HEAVY!r} if name in sys.modules]
    assert not found, (arguments, found)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("command", ["sasa", *COMMANDS])
def test_help_is_what_the_parsers_print(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    written = (sasa_command.HELP / f"{command}.txt").read_text(encoding="utf-8")
    # words, for versions of Python break lines in other places
    assert written.split() == texts()[command].split(), "python -m sasa_command writes it anew"


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["--version"], ["train", "--help"], ["info", "-h"]])
def test_help_does_not_import_pytorch(arguments):
    program = f"""
import sys
from sasa_command import main
sys.argv = ["sasa", *{arguments!r}]
assert main() == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.startswith(f"usage: sasa{' ' + arguments[0] if arguments[1:] else ''}") or arguments == [
        "--version"
    ]


@pytest.mark.parametrize("arguments", [["trian"], ["trian", "--help"], ["../help/sasa", "--help"], ["info", "--all"]])
def test_the_command_refuses_what_it_does_not_know(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sasa", *arguments])
    assert sasa_command.main() == 2
    assert "error: " in capsys.readouterr().err


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "sasa", "info"], capture_output=True, text=True, check=True)
    assert "implementations of the operator" in done.stdout


@pytest.mark.parametrize("arguments", [["info"], ["--help"]])
def test_a_reader_that_stops_early_is_no_error(arguments):
    """As ``sasa info | head -1``."""
    command = [sys.executable, "-m", "sasa", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 1


def test_another_broken_pipe_is_an_error(monkeypatch):
    def broken():
        raise BrokenPipeError

    monkeypatch.setattr(sasa_command, "_run", broken)
    with pytest.raises(BrokenPipeError):
        sasa_command.main()


@pytest.mark.parametrize("how", [KeyboardInterrupt, "as Lightning does"])
def test_ctrl_c_is_reported_in_a_line(how, monkeypatch, capsys):
    def interrupted():
        """Do nothing."""
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if how is KeyboardInterrupt:
                raise
            sys.exit(1)

    monkeypatch.setattr("sasa.train.demo.demo", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "sasa demo: interrupted\n"
