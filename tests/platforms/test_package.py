"""The package as installed: its pin on mlx, its typing, its shader text, its settings."""

import ast
import email
import re
import shutil
import sys
import tarfile
from importlib.metadata import requires, version
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_fused_adam
from mlx_fused_adam import _build_info, _compatibility
from support import tools
from support.processes import run_python

ROOT = Path(__file__).parents[2]
MLX = Path(mx.__file__).parent


@pytest.mark.parametrize("name", ["mlx", "mlx-metal", "mlx-cpu", "mlx-cuda-12"])
def test_another_mlx_is_rejected_with_the_fix(name):
    with pytest.raises(ImportError) as error:
        _compatibility.check_mlx({"mlx": _build_info.MLX_VERSION, name: "0.0.1"})
    message = str(error.value)
    for part in (
        f"{name} 0.0.1",
        f"mlx {_build_info.MLX_VERSION}",
        "pip install 'mlx[cpu]==",
        "docs/mlx-releases.md",
    ):
        assert part in message


def test_the_installed_mlx_is_accepted_with_its_back_end():
    installed = _compatibility.installed_mlx()
    assert len(installed) >= 2 and set(installed.values()) == {_build_info.MLX_VERSION}, installed
    _compatibility.check_mlx(installed)


def test_another_mlx_is_rejected_at_import(tmp_path):
    """With metadata that claims another mlx, the import fails before the extension loads."""
    fake = tmp_path / "mlx-0.0.1.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx\nVersion: 0.0.1\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mlx_fused_adam"
    result = run_python("-c", code)
    assert result.returncode != 0
    assert "ImportError: mlx-fused-adam was built for mlx" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="on macOS mlx always brings its back end")
def test_mlx_without_a_back_end_is_rejected_at_import_with_the_fix(tmp_path, monkeypatch):
    """As `pip install mlx` leaves it on Linux: no libmlx.so beside the module."""
    shutil.copytree(MLX, tmp_path / "mlx", ignore=shutil.ignore_patterns("lib", "include"))
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mlx_fused_adam"
    result = run_python("-c", code)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: mlx-fused-adam needs mlx"), result.stderr
    assert "libmlx.so" in last and "pip install 'mlx[cpu]==" in last


def test_mlx_is_pinned_exactly_and_once():
    """Plain mlx, whose back end the user chooses; the extras cpu and test bring the CPU's."""
    pin = _build_info.MLX_VERSION
    wanted = [r for r in requires("mlx-fused-adam") if re.match(r"mlx\b(?!-lm)", r)]
    assert sorted(wanted) == [
        'mlx-fused-adam[bench,cpu]; extra == "test"',
        'mlx-fused-adam[docs]; extra == "tools"',
        f"mlx=={pin}",
        f'mlx[cpu]=={pin}; extra == "cpu"',
    ]
    assert version("mlx") == pin
    build_files = [ROOT / "pyproject.toml", *(ROOT / "build_tools").iterdir()]
    places = [path.name for path in build_files if path.is_file() and f'"{pin}"' in path.read_text()]
    assert places == ["mlx_releases.py"]


def test_the_tests_have_the_nanobind_of_the_build(build_tools):
    from mlx_releases import NANOBIND

    wanted = [r for r in requires("mlx-fused-adam") if r.startswith("nanobind")]
    assert wanted == [f'nanobind=={NANOBIND[version("mlx")]}; extra == "test"']


@pytest.fixture
def build_tools(monkeypatch):
    """The tools of the build can be imported, as they are from its root."""
    monkeypatch.syspath_prepend(ROOT / "build_tools")
    monkeypatch.chdir(ROOT)


HOOKS = [
    "get_requires_for_build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
]


@pytest.mark.parametrize("hook", HOOKS)
def test_an_isolated_build_gets_the_newest_mlx_or_the_one_asked_for(hook, build_tools, monkeypatch):
    import build_backend
    from mlx_releases import NANOBIND, VARIABLE

    monkeypatch.delenv(VARIABLE, raising=False)
    newest = max(NANOBIND, key=lambda release: [int(part) for part in release.split(".")])
    for asked in (None, "", *NANOBIND):
        if asked is not None:
            monkeypatch.setenv(VARIABLE, asked)
        mlx = asked or newest
        found = [r for r in getattr(build_backend, hook)() if r.startswith(("mlx", "nanobind"))]
        assert found == [f"mlx[cpu]=={mlx}", f"nanobind=={NANOBIND[mlx]}"]
    monkeypatch.setenv(VARIABLE, "0.0.1")
    with pytest.raises(SystemExit, match=rf"{VARIABLE} must be one of .*{newest}.* but got '0.0.1'"):
        getattr(build_backend, hook)()


def test_an_old_python_is_rejected_in_one_line(build_tools, monkeypatch):
    """pip runs the build backend before it reads requires-python."""
    source = (ROOT / "build_tools/build_backend.py").read_text()
    ast.parse(source, feature_version=(3, 8))
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match=r"needs Python 3\.10 or newer, but this is 3\.9 \(") as error:
        exec(compile(source, "build_backend.py", "exec"), {})
    assert "\n" not in str(error.value)


def test_the_source_archive_does_not_say_which_mlx_its_wheels_are_for(build_tools, tmp_path):
    import build_backend

    with tarfile.open(tmp_path / build_backend.build_sdist(str(tmp_path))) as archive:
        (name,) = (name for name in archive.getnames() if name.endswith("/PKG-INFO"))
        metadata = email.message_from_bytes(archive.extractfile(name).read())
    assert metadata.get_all("Dynamic") == ["Requires-Dist"]


def test_the_build_backend_has_every_hook_of_scikit_build_core(build_tools):
    import build_backend
    import scikit_build_core.build

    missing = [name for name in scikit_build_core.build.__all__ if not hasattr(build_backend, name)]
    assert not missing


def test_builds_share_no_folder():
    """Each build has a temporary folder of its own, so that two from one clone do not meet."""
    from scikit_build_core.settings.skbuild_read_settings import SettingsReader

    settings = SettingsReader.from_file(ROOT / "pyproject.toml").settings
    assert settings.build_dir == ""


def build_tool(name, *arguments):
    return run_python(ROOT / f"build_tools/{name}.py", *arguments)


@pytest.fixture
def of_another_abi(build_tools, tmp_path):
    """The extension, as if another nanobind had built it; and the tag that it should have."""
    from check_abi import abi_tags

    extension = Path(mlx_fused_adam._ext.__file__)
    (tag,) = abi_tags(extension)
    other = tmp_path / extension.name
    shutil.copy(extension, other)
    other.write_bytes(extension.read_bytes().replace(tag.encode(), tag[:-1].encode() + b"x"))
    return other, tag


def test_the_build_rejects_a_nanobind_that_mlx_does_not_share(of_another_abi):
    from mlx_releases import NANOBIND

    other, tag = of_another_abi
    accepted = build_tool("check_abi", MLX, mlx_fused_adam._ext.__file__)
    assert accepted.returncode == 0, accepted.stderr
    rejected = build_tool("check_abi", MLX, other)
    assert rejected.returncode != 0
    assert f"ABI ['{tag[:-1]}x'] instead of ['{tag}']" in rejected.stderr
    assert f"pip install 'nanobind=={NANOBIND[version('mlx')]}'" in rejected.stderr


def test_the_build_rejects_what_has_no_tag_to_compare(tmp_path):
    core, extension = tmp_path / "core.cpython-311.so", tmp_path / "_ext.so"
    for file in (core, extension):
        file.write_bytes(b"no nanobind")
    rejected = build_tool("check_abi", tmp_path, extension)
    assert rejected.returncode != 0 and "ABI [] instead of []" in rejected.stderr


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS loads no module that was changed since it was signed")
def test_an_extension_of_another_abi_is_rejected_at_import(of_another_abi):
    """One that was built elsewhere, beside this very release of mlx but with another nanobind."""
    code = (
        "import importlib.util as u, sys, mlx.core\n"
        "spec = u.spec_from_file_location('mlx_fused_adam._ext', sys.argv[1])\n"
        "spec.loader.exec_module(u.module_from_spec(spec))"
    )

    def load(extension):
        return run_python("-c", code, extension)

    accepted = load(mlx_fused_adam._ext.__file__)
    assert accepted.returncode == 0, accepted.stderr
    rejected = load(of_another_abi[0])
    assert rejected.returncode != 0
    last = rejected.stderr.strip().splitlines()[-1]
    assert re.match(r"ImportError: mlx-fused-adam was built with nanobind \d+\.\d+\.\d+ and", last), last
    assert "docs/mlx-releases.md" in last


def test_the_shader_is_ascii_or_the_build_stops(tmp_path):
    header, shader, out = ROOT / "csrc/math/adam_rule.h", tmp_path / "a.metal", tmp_path / "a.cpp"
    shader.write_text('#include "math/adam_rule.h"\n', encoding="utf-8")
    accepted = build_tool("embed_shaders", out, header, shader)
    assert accepted.returncode == 0, accepted.stderr
    assert "struct AdamConstants" in out.read_text()
    shader.write_text('#include "math/adam_rule.h"\n// ½ of it\n', encoding="utf-8")
    rejected = build_tool("embed_shaders", tmp_path / "b.cpp", header, shader)
    assert rejected.returncode != 0 and not (tmp_path / "b.cpp").exists()
    assert "a.metal:2: the shader must be ASCII" in rejected.stderr


HOOKS = (ROOT / ".pre-commit-config.yaml").read_text()
(MLX_OF_HOOK,) = re.findall(r"\bmlx==([^],\s]+)", HOOKS)


def test_the_hook_s_pins_are_those_of_the_package(build_tools):
    """pre-commit installs the type checker by itself, and the mlx that it looks into."""
    from mlx_releases import NANOBIND

    pyproject = (ROOT / "pyproject.toml").read_text()
    (mypy,) = re.findall(r'"mypy==([^"]+)"', pyproject)
    assert re.findall(r"mirrors-mypy\n *rev: v(\S+)", HOOKS) == [mypy]
    assert next(iter(NANOBIND)) == MLX_OF_HOOK


@tools.needs("mypy")
@pytest.mark.skipif(MLX_OF_HOOK != _build_info.MLX_VERSION, reason=f"types are checked with mlx {MLX_OF_HOOK} alone")
def test_types_are_right_with_the_extension_s_stub(tmp_path):
    """The installed package, where mypy knows what the build has made; settings are pyproject.toml's."""
    check = ["-m", "mypy", "-p", "mlx_fused_adam", "--cache-dir", tmp_path]
    result = run_python(*check, "--config-file", ROOT / "pyproject.toml", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@tools.needs("mypy")
@pytest.mark.skipif(MLX_OF_HOOK != _build_info.MLX_VERSION, reason=f"types are checked with mlx {MLX_OF_HOOK} alone")
def test_a_misspelt_option_is_a_type_error(tmp_path):
    for call, name in (("Adam(1e-3, state_dtyp='int8')", "state_dtyp"), ("AdamW(1, lr=1)", "lr")):
        code = f"import mlx_fused_adam as fused; fused.{call}"
        result = run_python("-m", "mypy", "--cache-dir", tmp_path, "-c", code, cwd=tmp_path)
        assert f'Unexpected keyword argument "{name}"' in result.stdout, result.stdout


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
    return run_python("-c", code, MLX_FUSED_ADAM_NUM_THREADS=setting)


def test_the_rule_is_written_once():
    """The square root of Adam is taken in one place under csrc/ and metal/."""
    sources = [p for d in ("csrc", "metal") for p in (ROOT / d).rglob("*") if p.is_file()]
    holders = [p.name for p in sources if "sqrt(" in p.read_text().replace("rsqrt(", "")]
    assert holders == ["adam_rule.h"]
