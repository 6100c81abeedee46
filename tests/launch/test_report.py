"""python -m mlx_fused_adam: versions, devices, each kernel's verdict, times, and what to do; as text and as JSON."""

import json
import os

import mlx.core as mx
import pytest

from mlx_fused_adam import _backends, _build_info, _self_check
from mlx_fused_adam._tools import report as reporting
from support.processes import run_python

# Under DEVICE=cpu the CPU alone is judged: a wheel must not be lost to the virtual GPU of the Mac that builds it.
DEVICE = ["--device", "cpu"] if os.environ.get("DEVICE") == "cpu" else []


def run(*arguments):
    return run_python("-m", "mlx_fused_adam", *DEVICE, *arguments)


def test_the_report(process_device, process_backend):
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    for part in (
        f"built for mlx {_build_info.MLX_VERSION}",
        f"{process_device}: {process_backend}",
        "bfloat16 ",
        "int8 moments",
        " passed\n",
        "mlx.optimizers compiled",
        "GB/s",
        "peak memory of a training step of 8 × Linear(512)",
    ):
        assert part in done.stdout, part
    assert "All checks passed." in done.stdout and "To do:" not in done.stdout


def test_the_report_as_json(process_device, process_backend):
    done = run("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is True and report["advice"] == []
    assert report["versions"]["mlx"] == _build_info.MLX_VERSION
    device = next(x for x in report["devices"] if x["kind"] == process_device)
    assert device["backend"] == process_backend and device["ok"]
    assert set(device["checks"].values()) == {"passed"}
    assert len(device["checks"]) == len(reporting._CHECKED)
    assert device["milliseconds"].keys() == {
        f"{name}{mode}" for name in ("fused", "mlx.optimizers") for mode in ("", " compiled")
    }
    assert all(x > 0 for x in device["milliseconds"].values())
    peaks = device["peak_MB"]
    assert peaks.keys() == device["milliseconds"].keys()
    # Model and state alone are 25.2 MB; MLX's compiled step holds a second copy of parameters, m and v. On a GPU a
    # parameter that the backward pass has just read gets a new buffer, 7.3 MB in all.
    most = 40 if process_backend == "cpu" else 45
    assert 25 < peaks["fused compiled"] < most < peaks["mlx.optimizers compiled"]


@pytest.fixture
def quick(device, monkeypatch):
    """Without times, and with nothing checked yet."""
    monkeypatch.setattr(_backends, "_known", {})
    monkeypatch.setattr(reporting, "_speed", lambda kind: {})
    monkeypatch.setattr(reporting, "_peaks", lambda kind: {})


@pytest.mark.filterwarnings("ignore:mlx-fused-adam:")
@pytest.mark.parametrize("as_json", [False, True])
def test_a_kernel_that_fails_is_named_and_is_an_exit_status(quick, monkeypatch, capsys, as_json):
    run = _self_check.run

    def fails_for_bfloat16(extension, kind, dtypes, rounding):
        return "self-check is off" if dtypes == (mx.bfloat16,) * 3 else run(extension, kind, dtypes, rounding)

    assert reporting.main(as_json) == 0
    capsys.readouterr()
    monkeypatch.setattr(_self_check, "run", fails_for_bfloat16)
    monkeypatch.setattr(_backends, "_known", {})
    assert reporting.main(as_json) == 1
    text = capsys.readouterr().out
    if as_json:
        report = json.loads(text)
        checks = [device["checks"]["bfloat16"] for device in report["devices"]]
        assert checks == ["self-check is off"] * len(checks) and report["ok"] is False
        assert "file an issue with this report" in report["advice"][0]
    else:
        assert "bfloat16" in text and "self-check is off" in text
        assert "To do: file an issue with this report" in text and "A kernel failed" in text


def test_a_forced_choice_is_no_failure_and_is_named(quick, monkeypatch, capsys):
    monkeypatch.setenv("MLX_FUSED_ADAM_BACKEND", "stock")
    assert reporting.main(as_json=False) == 0
    text = capsys.readouterr().out
    assert "MLX_FUSED_ADAM_BACKEND=stock\n" in text and text.endswith("No kernel was checked.\n")
    assert "To do: MLX_FUSED_ADAM_BACKEND=stock is set; unset it" in text


def test_other_threads_than_the_machine_has_are_named(quick, monkeypatch, capsys):
    monkeypatch.setattr(reporting, "default_num_threads", lambda environment: 77)
    reporting.main(as_json=False)
    assert "this process may use 77" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:mlx-fused-adam:")
@pytest.mark.parametrize(("name", "status"), [("Apple Paravirtual device", 0), ("Apple M4 Max", 1)])
def test_a_virtual_gpu_is_reported_and_not_judged(quick, monkeypatch, capsys, name, status):
    monkeypatch.setattr(reporting, "_name", lambda kind: f"{name}, memory 8.0 GiB")
    monkeypatch.setattr(_self_check, "run", lambda *_: "self-check is off")
    assert reporting.main(as_json=False) == status
    text = capsys.readouterr().out
    assert "self-check is off" in text
    assert ("virtual, not judged" in text) == (status == 0)
    assert ("file an issue" in text) == (status == 1)


def test_nothing_is_timed_on_a_virtual_gpu(quick, monkeypatch):
    """It may hang, and its times say nothing of a Mac's."""
    asked = []
    monkeypatch.setattr(reporting, "_speed", lambda kind: asked.append(kind) or {})
    reporting.collect()
    assert asked
    asked.clear()
    monkeypatch.setattr(reporting, "_name", lambda kind: "Apple Paravirtual device")
    report = reporting.collect()
    assert not asked and report["ok"] and all(device["virtual"] for device in report["devices"])


def test_one_device_alone(quick):
    assert [device["kind"] for device in reporting.collect("cpu")["devices"]] == ["cpu"]


def test_the_command_takes_a_device():
    if not mx.is_available(mx.gpu):
        done = run_python("-m", "mlx_fused_adam", "--device", "gpu")
        assert done.returncode == 2 and "argument --device: this MLX has no gpu" in done.stderr
    done = run_python("-m", "mlx_fused_adam", "--device", "cpu", "plan", "1000")
    assert done.returncode == 2 and "--device belongs to the report; plan prints none" in done.stderr
