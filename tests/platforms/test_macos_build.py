"""The wheel that a Mac would install, cross-compiled: will it link, load and unpack there?

Built by macos/build.py. Nothing is run; what is proved is that all of csrc/ compiles for arm64
macOS and that every symbol it needs exists there. Skipped, with the reason, where ziglang, lief or
MLX's macOS wheels cannot be had.
"""

import email
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support import tools

if sys.platform == "darwin":
    pytest.skip("on a Mac the real build is installed and tested", allow_module_level=True)
pytestmark = tools.module_needs("lief", "ziglang")

from emulator import project_shader  # noqa: E402
from platforms.macos import build as macos_build  # noqa: E402
from platforms.macos.mach_o import (  # noqa: E402
    LIBMLX,
    Module,
    inspect,
    missing_symbols,
    python_symbols,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT / "build_tools"))
from check_abi import abi_tags  # noqa: E402


@pytest.fixture(scope="module")
def mac_mlx() -> macos_build.MacMLX:
    try:
        return macos_build.fetch_mlx()
    except macos_build.DownloadError as error:
        pytest.skip(f"MLX's macOS wheels cannot be had here: {error}")


@pytest.fixture(scope="module")
def flavours(mac_mlx: macos_build.MacMLX) -> list[macos_build.MacMLX]:
    return macos_build.fetch_every_mlx()


@pytest.fixture(scope="module")
def libmlx(mac_mlx: macos_build.MacMLX) -> Module:
    return inspect(mac_mlx.library)


@pytest.fixture(scope="module")
def wheel(mac_mlx: macos_build.MacMLX) -> Path:
    return macos_build.build()


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as pip, told to act for a Mac, installs it."""
    target = tmp_path_factory.mktemp("site-packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
    platform = ["--platform", macos_build.PLATFORM, "--target", str(target)]
    subprocess.run([*pip, *platform, str(wheel)], check=True)
    return target


@pytest.fixture(scope="module")
def extension(installed: Path) -> Path:
    return installed / f"mlx_fused_adam/_ext{macos_build.EXT_SUFFIX}"


@pytest.fixture(scope="module")
def module(extension: Path) -> Module:
    return inspect(extension)


def test_wheel_has_the_tag_and_content_of_a_mac_installation(wheel: Path) -> None:
    python = f"cp3{sys.version_info.minor}"
    assert wheel.name.endswith(f"-{python}-{python}-macosx_14_0_arm64.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata_name = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(metadata_name))
    sources = {
        f"mlx_fused_adam/{path.relative_to(ROOT / 'python/mlx_fused_adam').as_posix()}"
        for path in (ROOT / "python/mlx_fused_adam").rglob("*")
        if path.suffix in {".py", ".typed"} and "__pycache__" not in path.parts
    }
    assert sources <= names
    binaries = {name for name in names if Path(name).suffix in {".so", ".dylib"}}
    assert binaries == {f"mlx_fused_adam/_ext{macos_build.EXT_SUFFIX}"}
    requirements = metadata.get_all("Requires-Dist")
    assert any(re.match(r"mlx(\[\w+\])? ?==", requirement) for requirement in requirements)


def test_every_symbol_it_needs_is_exported_on_a_mac(module: Module, libmlx: Module) -> None:
    from_mlx = {name for names in module.needed.values() for name in names if "N3mlx4core" in name}
    assert from_mlx, "the extension uses nothing of MLX?"
    assert from_mlx <= libmlx.exported, sorted(from_mlx - libmlx.exported)
    assert missing_symbols(module, libmlx) == set()


def test_every_macos_release_that_mlx_has_a_wheel_for_exports_them(
    module: Module, flavours: list[macos_build.MacMLX]
) -> None:
    assert len(flavours) > 1
    for flavour in flavours:
        missing = missing_symbols(module, inspect(flavour.library))
        assert not missing, f"macOS {flavour.macos}: {sorted(missing)}"


def test_the_headers_of_every_macos_release_are_those_compiled_against(
    mac_mlx: macos_build.MacMLX, flavours: list[macos_build.MacMLX]
) -> None:
    """Else the extension would have to be compiled against each."""

    def headers(mac: macos_build.MacMLX) -> dict[str, bytes]:
        folder = mac.site_packages / "mlx/include"
        found = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in found}

    expected = headers(mac_mlx)
    assert "mlx/array.h" in expected
    for flavour in flavours:
        assert headers(flavour) == expected, f"macOS {flavour.macos}"


def test_a_macs_own_build_is_for_the_oldest_macos_that_mlx_has_a_wheel_for(
    monkeypatch: pytest.MonkeyPatch, flavours: list[macos_build.MacMLX]
) -> None:
    """Whatever MACOSX_DEPLOYMENT_TARGET says; the wheel's tag follows the same setting."""
    from scikit_build_core.settings.skbuild_read_settings import SettingsReader

    monkeypatch.setattr(sys, "platform", "darwin")
    settings = SettingsReader.from_file(ROOT / "pyproject.toml").settings
    target = settings.cmake.define["CMAKE_OSX_DEPLOYMENT_TARGET"]
    assert target == f"{flavours[-1].macos}.0" == f"{macos_build.OLDEST}.0"


def test_it_uses_metal_through_mlx(module: Module) -> None:
    for function in ("get_library", "get_kernel", "set_input_array", "set_output_array"):
        assert any("4core5metal" in name and function in name for name in module.needed[LIBMLX]), function


def test_a_symbol_that_mlx_does_not_export_is_caught(
    mac_mlx: macos_build.MacMLX, libmlx: Module, tmp_path: Path
) -> None:
    planted = tmp_path / "planted.so"
    macos_build.compile_alone(HERE / "macos/unexported.cpp", planted, mac_mlx)
    missing = missing_symbols(inspect(planted), libmlx)
    assert any("4core4fast6Custom" in name for name in missing), sorted(missing)


def test_load_commands_are_those_of_an_installed_extension(
    module: Module, extension: Path, mac_mlx: macos_build.MacMLX
) -> None:
    assert module.cpu == "ARM64"
    assert module.minimum_macos == (14, 0, 0)
    assert module.signed, "arm64 macOS rejects unsigned code"
    assert module.rpaths == ["@loader_path/../mlx/lib"]
    assert LIBMLX in module.libraries
    elsewhere = [name for name in module.libraries if not name.startswith(("/usr/lib/", "/System/Library/"))]
    assert elsewhere == [LIBMLX]
    beside_mlx = str(mac_mlx.site_packages / extension.parent.name)
    folder = Path(module.rpaths[0].replace("@loader_path", beside_mlx))
    assert (folder / Path(LIBMLX).name).resolve() == mac_mlx.library.resolve()


def test_python_finds_the_module_and_nothing_leaks_from_it(module: Module) -> None:
    assert "_PyInit__ext" in module.exported
    # nanobind before 3 exports its exceptions, which modules share.
    exported = {name for name in module.exported if name.startswith("__Z")}
    assert not {name for name in exported if not re.match(r"__ZT[ISV]N8nanobind", name)}
    assert module.needed[""] & python_symbols()


def test_it_shares_its_types_with_mlx(extension: Path, mac_mlx: macos_build.MacMLX) -> None:
    # As the build has checked: build_tools/check_abi.py.
    core = next(mac_mlx.site_packages.glob("mlx/core.*.so"))
    assert len(abi_tags(core)) == 1 and abi_tags(extension) == abi_tags(core)


def test_the_shader_is_inside(extension: Path) -> None:
    content = extension.read_bytes()
    for source in project_shader.SOURCES:
        lines = source.read_text().splitlines()
        embedded = [line for line in lines if not line.startswith(("#include", "#pragma once"))]
        absent = [line for line in embedded if line.encode() not in content]
        assert not absent, f"{source}: {absent[:3]}"
