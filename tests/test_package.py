"""The package as installed: its pin on mlx, its typing, its shader text, its settings."""

import subprocess
import sys
from importlib.metadata import requires, version
from importlib.resources import files
from pathlib import Path

import pytest

import mlx_fused_adam
from mlx_fused_adam import _build_info, _compatibility

ROOT = Path(__file__).parent.parent


def test_another_mlx_is_refused_with_the_mend():
    with pytest.raises(ImportError) as error:
        _compatibility.check_mlx("0.0.1")
    message = str(error.value)
    for part in ("mlx 0.0.1", f"mlx {_build_info.MLX_VERSION}", "pip install 'mlx[cpu]=="):
        assert part in message


def test_another_mlx_is_refused_at_import(tmp_path):
    """With metadata that claims another mlx, the import fails before the extension loads."""
    fake = tmp_path / "mlx-0.0.1.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx\nVersion: 0.0.1\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mlx_fused_adam"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "ImportError: mlx-fused-adam was built for mlx" in result.stderr


def test_mlx_is_pinned_exactly_and_once():
    pinned = [r for r in requires("mlx-fused-adam") if r.startswith("mlx") and "extra ==" not in r]
    assert pinned == [f"mlx[cpu]=={_build_info.MLX_VERSION}"]
    assert version("mlx") == _build_info.MLX_VERSION
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert pyproject.count(_build_info.MLX_VERSION) == 1


def test_nanobind_of_the_tests_is_that_of_the_build():
    lines = (ROOT / "pyproject.toml").read_text().replace(",", "\n").split('"')
    pins = [part for part in lines if part.startswith("nanobind==")]
    assert len(pins) == 2 and len(set(pins)) == 1, pins


def test_typed_with_a_stub_for_the_extension():
    package = files("mlx_fused_adam")
    assert (package / "py.typed").is_file()
    extension = Path(mlx_fused_adam._ext.__file__)
    stub = (extension.parent / "_ext.pyi").read_text()
    assert "def adam_update(" in stub and "mlx.core.array" in stub


@pytest.mark.parametrize("setting", ["0", "many", "257", "-1", "2x"])
def test_a_bad_thread_setting_is_an_error_at_import(setting):
    result = import_with(setting)
    assert result.returncode != 0
    assert "MLX_FUSED_ADAM_NUM_THREADS must be from 1 to 256" in result.stderr


def test_the_thread_setting_is_respected():
    result = import_with("3")
    assert result.stdout.strip() == "3", result.stderr


def import_with(setting):
    code = "import mlx_fused_adam; print(mlx_fused_adam.num_threads())"
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "MLX_FUSED_ADAM_NUM_THREADS": setting},
    )


def test_the_rule_stands_once():
    """The square root of Adam is taken in one place under csrc/ and metal/."""
    sources = [p for d in ("csrc", "metal") for p in (ROOT / d).iterdir() if p.is_file()]
    holders = [p.name for p in sources if "sqrt(" in p.read_text().replace("rsqrt(", "")]
    assert holders == ["adam_rule.h"]


def test_the_report():
    result = subprocess.run(
        [sys.executable, "-m", "mlx_fused_adam"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for part in (
        _build_info.MLX_VERSION,
        "cpu: cpu",
        "bfloat16 ",
        "every kernel is right",
        "stock compiled",
        "GB/s",
    ):
        assert part in result.stdout, part
    assert "Everything that should work does." in result.stdout
