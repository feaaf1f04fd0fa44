"""An interrupted run ends with status 130 (terminated: 143) and leaves nothing, hidden folders included."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import files

# What a test starts behind nohup, or with & in a script, would inherit is to ignore it.
HEARS_SIGINT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"

# Stops in one phase of the pipeline and says so, as if the model were large.
PROGRAM = (
    HEARS_SIGINT
    + """
import sys, time
from quarot_onnx.cli import main
from quarot_onnx{room} import {module}
def slow(*args, **kwargs):
    print("in", flush=True)
    while True:
        time.sleep(1)
{module}.{function} = slow
sys.argv[1:] = {arguments!r}
main()
"""
)
PATIENCE = 300
"""Seconds until a run that ignores a signal is given up; how long one takes to end depends on the machine's load."""

PHASES = {
    "rotating": (".run", "turning", "apply_plan"),
    "verifying": (".run", "turning", "compare"),
    "calibrating": ("", "pipeline", "static_ranges.calibrate"),
    "writing": (".io", "layout", "_write_tensor"),
}


@pytest.mark.parametrize(("phase", "sent"), [*((phase, "SIGINT") for phase in PHASES), ("writing", "SIGTERM")])
def test_nothing_is_left(phase: str, sent: str, model: Path, tmp_path: Path) -> None:
    status, word = {"SIGINT": (130, "interrupted"), "SIGTERM": (143, "terminated")}[sent]
    before = files(tmp_path)
    room, module, function = PHASES[phase]
    arguments = ["quantize", str(model), str(tmp_path / "new" / "q.onnx"), "--scheme", "w8a8-static"]
    arguments += ["--calib-samples", "2", "--calib-seq-len", "16"]
    code = PROGRAM.format(room=room, module=module, function=function, arguments=arguments)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "in\n"
        run.send_signal(signal.Signals[sent])
        _, err = run.communicate(timeout=PATIENCE)
    assert run.returncode == status
    assert err.splitlines() == [f"{word}: no partial output was left"]
    assert files(tmp_path) == before


def test_a_text_that_is_interrupted_ends_its_line(model: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    arguments = ["generate", str(model), "--prompt", "The quick"]
    code = PROGRAM.format(room=".generation", module="generator", function="next_token", arguments=arguments)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "in\n"
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=PATIENCE)
    assert (run.returncode, out, err) == (130, "\n", "interrupted: no partial output was left\n")
    assert files(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX pipes")
def test_a_reader_that_is_gone_is_no_fault(model: Path) -> None:
    code = "import sys; from quarot_onnx.cli import main; main()"
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", code, "generate", str(model), "--prompt", "The quick", "--max-new-tokens", "9"]
    with os.fdopen(writer, "w") as gone:
        done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [("--version",), ("rotate", "{model}", "{target}", "--no-verify"), ("generate",)])
def test_standard_output_that_is_full_is_told(
    command: tuple[str, ...], unbuffered: str, model: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out" / "model.onnx"
    more = [str(model), "--prompt", "The quick", "--max-new-tokens", "2"] if command == ("generate",) else []
    given = [word.format(model=model, target=target) for word in command] + more
    code = "import sys; from quarot_onnx.cli import main; main()"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, *given],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: standard output cannot be written (No space left on device)")
    assert target.exists() == ("rotate" in command)


def test_an_interrupt_while_importing_is_quiet(tmp_path: Path) -> None:
    code = (
        HEARS_SIGINT + "import sys, os\n"
        "from quarot_onnx.cli import main\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.argv[1:] = ['inspect', 'no.onnx']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "interrupted: no partial output was left\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_forked_process_ends_without_a_word(sent: signal.Signals) -> None:
    # As lm-eval's pool ends its workers once their samples are drawn.
    code = (
        HEARS_SIGINT + "import os, sys\n"
        "from quarot_onnx import cli\n"
        "from quarot_onnx.cli import running\n"
        "def helped():\n"
        "    child = os.fork()\n"
        "    if child:\n"
        "        return -os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
        f"    os.kill(os.getpid(), {int(sent)})\n"
        "    return 0\n"
        "running.run = helped\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (sent, "")


def test_an_error_costs_no_heavy_import() -> None:
    code = (
        "import sys\n"
        "from quarot_onnx.cli.running import run\n"
        "status = run(['inspect', 'missing.onnx'])\n"
        "heavy = {'numpy', 'scipy', 'onnx', 'onnx_ir', 'onnxruntime', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(f'{status} {heavy}' if heavy or status != 2 else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_waits_for_no_configuration() -> None:
    code = (
        "import sys\n"
        "from quarot_onnx.cli.running import run\n"
        "status = run(['--help'])\n"
        "sys.exit('pydantic' in sys.modules or 'numpy' in sys.modules or status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_closed_standard_streams_are_no_fault(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "rotated.onnx"
    code = "import sys; from quarot_onnx.cli import main; main()"
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code, "rotate", model, out]
    assert subprocess.run(list(map(str, command)), check=False).returncode == 0
    assert files(tmp_path)[out.name].startswith(b"\x08")  # a ModelProto, with nothing printed into it
