"""python -m mlx_fused_adam run: a script runs as without it, but for its optimizers; so do the processes that it
starts.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from mlx_fused_adam import __main__
from mlx_fused_adam._tools import run as launcher
from support.launched import needs_launch, of_ring

RUN = [sys.executable, "-m", "mlx_fused_adam", "run"]
SAYS = "mlx-fused-adam"

BUILD = """
    import mlx.core as mx
    import mlx.optimizers as optim
    optimizer = optim.AdamW(1e-3)
    print(type(optimizer).__module__.split(".")[0], optimizer.bias_correction)
"""
TRAIN = """
    parameters = {"w": mx.ones((3, 5)), "b": mx.ones((5,))}
    for _ in range(4):
        parameters = optimizer.apply_gradients(parameters, parameters)
        mx.eval(parameters, optimizer.state)
"""


needs_no_pythonpath = pytest.mark.skipif(
    bool(os.environ.get("PYTHONPATH")), reason="the package is found by PYTHONPATH, which the test takes away"
)


@pytest.fixture
def script(tmp_path):
    def write(code, name="script.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(textwrap.dedent, code.split("\n---\n"))))
        return path

    return write


def run(*arguments, command=RUN, environment=None, **kwargs):
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
        timeout=120,
        **kwargs,
    )


def with_folder(path):
    """An environment in which Python looks for modules in this folder first."""
    return {"PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])}


def said(done):
    return [line for line in done.stderr.splitlines() if line.startswith(SAYS)]


def test_optimizers_are_fused_and_two_lines_say_so(script, process_backend):
    done = run(script(f"{BUILD}\n---\n{TRAIN}"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "mlx_fused_adam False\n"
    first, last = said(done)
    assert "mlx.optimizers.Adam and AdamW are the fused ones" in first and "with" not in first
    told = re.escape(f"{SAYS}: built 1 AdamW; {process_backend} ran 8 updates of tensors; peak memory ")
    assert re.fullmatch(told + r"[\d.]+ MB", last), last


@pytest.mark.parametrize("first", ["mlx_fused_adam", "mlx.optimizers.optimizers", "mlx.nn"])
def test_whatever_is_imported_first(script, first):
    done = run(script(f"import {first}\n---\n{BUILD}"))
    assert done.stdout == "mlx_fused_adam False\n", done.stderr
    assert done.returncode == 0 and len(said(done)) == 2


def test_updates_that_no_kernel_ran_are_not_claimed(script):
    code = script(f"{BUILD}\n---\n{TRAIN}")
    done = run(code, environment={"MLX_FUSED_ADAM_BACKEND": "stock"})
    assert done.returncode == 0, done.stderr
    assert "no kernel has updated anything" in said(done)[-1]
    assert "MLX_FUSED_ADAM_BACKEND=stock" in said(done)[-1]
    done = run(script("import mlx.optimizers"))
    assert said(done)[-1] == f"{SAYS}: built no Adam or AdamW"


def test_a_process_that_trains_nothing_imports_nothing(script):
    done = run(script("import sys; print(sorted(m for m in sys.modules if m.startswith('mlx')))"))
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)


def test_what_was_not_replaced_is_counted_and_what_ran_is_said_anyway(script):
    code = """
        import mlx.core as mx
        import mlx.optimizers as o
        import mlx_fused_adam as fused
        class Mine(o.AdamW):
            pass
        optimizer = fused.AdamW(1e-3)
        Mine(1e-3), Mine(1e-3), o.Adamax(1e-3)
    """
    done = run(script(f"{code}\n---\n{TRAIN}"))
    assert done.returncode == 0, done.stderr
    assert said(done)[-1].startswith(f"{SAYS}: built no Adam or AdamW; 2 Mine, 1 Adamax stayed as it was; ")
    assert said(done)[-1].endswith("ran 8 updates of tensors")


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "2>/dev/full", ">&- 2>&-"])
def test_closed_and_full_streams_end_nothing(script, tmp_path, closed):
    path = script(
        """
        import pathlib
        import mlx.optimizers as o
        pathlib.Path(__file__).with_name("said").write_text(type(o.Adam(1e-3)).__module__)
        """
    )
    command = f"{shlex.join([*RUN, str(path)])} {closed}"
    done = subprocess.run(command, shell=True, timeout=120)
    assert done.returncode == 0
    assert path.with_name("said").read_text() == "mlx_fused_adam._optimizers"


def test_without_a_stderr_nothing_goes_to_stdout(script):
    done = run(script(f"import sys\nsys.stderr = None\n---\n{BUILD}"))
    assert (done.returncode, done.stdout) == (0, "mlx_fused_adam False\n"), done.stderr


def test_it_starts_once_whatever_is_loaded_again(script):
    done = run(script(f"{BUILD}\n---\nimport importlib, mlx_fused_adam\nimportlib.reload(mlx_fused_adam)"))
    assert done.returncode == 0, done.stderr
    assert len(said(done)) == 2


def test_whoever_looks_for_the_module_first_finds_its_own_loader(script):
    code = """
        from importlib.util import find_spec
        for name in ("mlx_fused_adam", "mlx.optimizers"):
            print(find_spec(name).loader.get_filename(name).endswith("__init__.py"))
    """
    done = run(script(code))
    assert done.stdout == "True\nTrue\n", done.stderr


@pytest.mark.parametrize("joined", [["-Om", "mlx_fused_adam"], ["-O", "-mmlx_fused_adam"]])
def test_flags_are_kept_however_they_are_written(script, joined):
    path = script("import sys; print(sys.flags.optimize)")
    done = run("run", path, command=[sys.executable, *joined])
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize("arguments", [["--", "-v"], ["--"], ["a", "--", "b"], ["--", "--"]])
@pytest.mark.parametrize("before", [[], ["--"]])
def test_dashes_reach_the_script(script, arguments, before):
    path = script("import sys; print(sys.argv[1:])")
    done = run(*before, path, *arguments)
    assert done.stdout == f"{arguments}\n", done.stderr


ABOUT = """
    import json, os, sys, mlx.optimizers as o
    from importlib.util import find_spec
    print(json.dumps({
        "argv": sys.argv, "name": __name__, "file": __file__, "path": sys.path, "flags": list(sys.flags),
        "spec": __spec__ and __spec__.name, "main": sys.modules["__main__"].__dict__ is globals(), "xoptions":
        sys._xoptions, "loader": type(o.__loader__).__name__, "spec_loader": type(o.__spec__.loader).__name__, "input":
        sys.stdin.read(), "cwd": os.getcwd(), "sitecustomize": "_tools/startup" in
        str(getattr(sys.modules.get("sitecustomize"), "__file__", "")), "origin": find_spec("mlx.optimizers").origin,
    }))
    sys.stdout.flush()
    sys.exit(int(sys.argv[-1]))
"""


@pytest.mark.parametrize("flags", [[], ["-u", "-O", "-X", "utf8"], ["-P"]])
@pytest.mark.parametrize("as_module", [False, True])
def test_a_script_sees_what_it_sees_without(script, tmp_path, as_module, flags):
    if flags == ["-P"] and sys.version_info < (3, 11):
        pytest.skip("Python has -P since 3.11")
    path = script(ABOUT, "folder/about.py")
    script("", "folder/__init__.py")
    target = ["-m", "folder.about"] if as_module else [path]
    if as_module and flags == ["-P"]:
        target = ["-m", "about"]
    arguments = [*target, "--adam-options", "x", "-m", "--", "-h", "", "3"]
    kwargs = dict(cwd=tmp_path, input="line", environment=with_folder(path.parent))
    plain = run(*arguments, command=[sys.executable, *flags], **kwargs)
    launched = run(*arguments, command=[sys.executable, *flags, *RUN[1:]], **kwargs)
    assert plain.returncode == launched.returncode == 3, plain.stderr + launched.stderr
    expected, found = json.loads(plain.stdout), json.loads(launched.stdout)
    # Nobody's sitecustomize was there before the launcher's, which then stays in its place.
    assert not expected.pop("sitecustomize")
    found.pop("sitecustomize")
    assert found == expected


@pytest.mark.parametrize("code", ["raise ValueError('of the script')", "x = [", "import sys; sys.exit('said')"])
def test_failures_look_as_without(script, code):
    path = script(code)
    plain, launched = run(path, command=[sys.executable]), run(path)
    assert launched.returncode == plain.returncode == 1
    assert (launched.stdout, launched.stderr) == (plain.stdout, plain.stderr)


def test_what_is_not_there_is_said_by_python(tmp_path):
    for target in (["nothing.py"], ["-m", "nothing_at_all"], [tmp_path / "nothing"]):
        plain = run(*target, command=[sys.executable], cwd=tmp_path)
        launched = run(*target, cwd=tmp_path)
        assert plain.returncode == launched.returncode != 0
        assert launched.stderr == plain.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupt_arrives_as_without(script, tmp_path):
    path = script(
        f"""{BUILD}
---
import pathlib, time
pathlib.Path("ready").touch()
time.sleep(60)
"""
    )
    process = subprocess.Popen(
        [*RUN, str(path)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in stderr
    # Between the two lines stands the traceback of the script alone.
    assert stderr.count('File "') == stderr.count(f'File "{path}"'), stderr
    assert stderr.rstrip().splitlines()[-1].startswith(f"{SAYS}: built 1 AdamW")


def test_child_processes_inherit_it(script):
    child = script(BUILD, "child.py")
    parent = script(
        f"""
import multiprocessing, subprocess, sys
def of_spawned(queue):
    import mlx.optimizers as optim
    queue.put(type(optim.AdamW(1e-3)).__module__)
if __name__ == "__main__":
    subprocess.run([sys.executable, {str(child)!r}], check=True)
    subprocess.run([sys.executable, "-c", "import mlx.optimizers as o; print(type(o.Adam(1)).__module__)"], check=True)
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=of_spawned, args=(queue,))
    process.start()
    process.join()
    print(process.exitcode, queue.get())
"""
    )
    done = run("--adam-options", '{"bias_correction": true}', parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "mlx_fused_adam True",
        "mlx_fused_adam._optimizers",
        "0 mlx_fused_adam._optimizers",
    ]


def test_a_user_s_sitecustomize_is_run_too(script, tmp_path):
    script("import builtins; builtins.CUSTOM = __file__", "site/sitecustomize.py")
    child = script("import sitecustomize; print(CUSTOM == sitecustomize.__file__)", "child.py")
    path = script(
        f"{BUILD}\n---\nimport subprocess, sys\nprint(CUSTOM)\nsubprocess.run([sys.executable, {str(child)!r}])"
    )
    done = run(path, environment=with_folder(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    assert "mlx_fused_adam False" in done.stdout and f"{tmp_path / 'site/sitecustomize.py'}\n" in done.stdout
    assert "Error in sitecustomize" not in done.stderr


def test_a_user_s_broken_sitecustomize_is_reported_as_without(script, tmp_path):
    script("import not_there", "site/sitecustomize.py")
    path, environment = script(BUILD), with_folder(tmp_path / "site")
    plain = run(path, command=[sys.executable], environment=environment)
    done = run(path, environment=environment)
    # By the script's process, after that of `run` itself.
    assert [x.stderr.count("No module named 'not_there'") for x in (plain, done)] == [1, 2]
    assert done.returncode == 0 and done.stdout == "mlx_fused_adam False\n"


def test_another_python_s_optimizers_stay(script, tmp_path):
    """As a child in an environment whose mlx is another one."""
    metadata = "Metadata-Version: 2.1\nName: mlx\nVersion: 0.0.1\n"
    script(metadata, "other/mlx-0.0.1.dist-info/METADATA")
    child = script(BUILD.replace(", optimizer.bias_correction", ""), "child.py")
    parent = script(
        f"""
import os, subprocess, sys
paths = os.environ["PYTHONPATH"].split(os.pathsep)
environment = {{**os.environ, "PYTHONPATH": os.pathsep.join([paths[0], {str(tmp_path / "other")!r}, *paths[1:]])}}
sys.exit(subprocess.run([sys.executable, {str(child)!r}], env=environment).returncode)
"""
    )
    done = run(parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "mlx\n"
    (told,) = said(done)
    start = f"{SAYS}: this process keeps mlx.optimizers: mlx-fused-adam was built for mlx"
    assert told.startswith(start) and "mlx 0.0.1 is installed" in told


def test_options_come_from_the_command_or_the_environment(script):
    path = script(BUILD)
    options = {launcher.OPTIONS: '{"bias_correction": true, "state_dtype": "bfloat16"}'}
    done = run(path, environment=options)
    assert done.stdout == "mlx_fused_adam True\n", done.stderr
    assert said(done)[0].endswith("with bias_correction=True, state_dtype='bfloat16'")
    done = run("--adam-options", '{"max_grad_norm": 1.0}', path, environment=options)
    assert done.stdout == "mlx_fused_adam False\n"
    assert said(done)[0].endswith("with max_grad_norm=1.0")
    done = run("--adam-options", "{}", path, environment=options)
    assert done.stdout == "mlx_fused_adam False\n"


def test_an_option_that_nothing_took_is_said_at_the_end(script):
    done = run("--adam-options", '{"weight_decay": 0.5}', script(BUILD.replace("AdamW", "Adam")))
    assert "not used, since no optimizer that was built takes it: weight_decay" in said(done)[-1]


@pytest.mark.parametrize(
    "options, message",
    [
        ('{"max_grad_nrom": 1}', "unexpected keyword argument 'max_grad_nrom'"),
        ('{"state_dtype": "int2"}', "int2"),
        ('{"learning_rate": 1}', "learning_rate"),
        ("[1]", "must be a JSON object"),
        (
            "max_grad_norm=1",
            """must be JSON in single quotes, as '{"max_grad_norm": 1.0}', but got max_grad_norm=1""",
        ),
        ('{"bias_correction": "false"}', "bias_correction must be True or False but got 'false'"),
        ("{", "Expecting property name"),
    ],
)
def test_bad_options_are_rejected_before_the_script_runs(script, options, message):
    path = script("print('ran')")
    for done in (
        run("--adam-options", options, path),
        run(path, environment={launcher.OPTIONS: options}),
    ):
        assert done.returncode == 2 and done.stdout == ""
        assert message in done.stderr


@pytest.mark.parametrize("arguments", [["run"], ["run", "-m"], ["--json", "run", "x.py"]])
def test_a_command_that_is_none_is_rejected(arguments):
    done = run(*arguments, command=RUN[:-1])
    assert done.returncode == 2
    assert "is required" in done.stderr or "run prints none" in done.stderr


def test_an_empty_variable_is_none(script):
    done = run(script(BUILD), environment={launcher.OPTIONS: ""})
    assert done.stdout == "mlx_fused_adam False\n", done.stderr


@needs_no_pythonpath
def test_a_python_that_would_not_obey_is_rejected(script):
    done = run(script("print('ran')"), command=[sys.executable, "-E", *RUN[1:]])
    assert done.returncode == 2 and "-E, -I and -S" in done.stderr and done.stdout == ""


@needs_no_pythonpath
@pytest.mark.parametrize("before", [launcher._STARTUP, ""], ids=["run within run", "empty"])
def test_its_folder_is_in_pythonpath_once_and_nothing_beside_it(script, before):
    done = run(script("import os; print(os.environ['PYTHONPATH'])"), environment={"PYTHONPATH": before})
    assert done.stdout == f"{launcher._STARTUP}\n", done.stderr


def test_a_folder_that_pythonpath_cannot_hold_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(launcher, "_STARTUP", f"a{os.pathsep}b")
    monkeypatch.setattr(sys, "argv", ["mlx_fused_adam", "run", "script.py"])
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("became another process"))
    with pytest.raises(SystemExit):
        __main__.main()
    assert "must not contain" in capsys.readouterr().err


def test_a_file_comes_before_a_command_beside_python_before_one_on_path(script, tmp_path, monkeypatch):
    for folder in ("beside", "path"):
        script("", f"{folder}/trainer").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "beside/python"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert launcher._script("trainer") == str(tmp_path / "beside/trainer")
    script("", "trainer")
    assert launcher._script("trainer") == "trainer"


def test_an_installed_command_is_found_by_name(script, tmp_path):
    command = script(
        f"#!{sys.executable}\nimport mlx.optimizers as o\nprint(type(o.Adam(1)).__module__)",
        "bin/trainer",
    )
    command.chmod(0o755)
    environment = {"PATH": os.pathsep.join([str(command.parent), os.environ["PATH"]])}
    done = run("trainer", environment=environment)
    assert done.stdout == "mlx_fused_adam._optimizers\n", done.stderr


@needs_launch
def test_the_ranks_of_mlx_launch_inherit_it(script):
    path = script(f"{BUILD}\n---\nimport sys\nmx.distributed.init(backend='ring', strict=True)\n---\n{TRAIN}")
    done = run("mlx.launch", *of_ring(2), path)
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout + done.stderr
    assert text.count("mlx_fused_adam False") == 2, text
    for rank in range(2):
        assert f"{SAYS} (rank {rank}): built 1 AdamW" in text, text
