"""The file that save_optimizer leaves: permissions, links, names, and file systems that cannot do something."""

import errno
import os
import stat
import subprocess
import sys

import pytest

import mlx_fused_adam as fused
from support.checkpoints import SETTINGS, saved, train, tree

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX"),
]


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    old = os.umask(0o022)
    yield os.umask
    os.umask(old)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077], ids=oct)
def test_a_new_file_has_the_mode_of_the_umask(mask, umask, tmp_path):
    umask(mask)
    saved(tmp_path / "o")
    assert mode(tmp_path / "o") == 0o666 & ~mask


@pytest.mark.parametrize("kept", [0o640, 0o600, 0o664, 0o444], ids=oct)
def test_an_old_file_keeps_its_mode(kept, umask, tmp_path):
    optimizer = saved(tmp_path / "o")
    (tmp_path / "o").chmod(kept)
    train(optimizer, tree(), [3])
    fused.save_optimizer(tmp_path / "o", optimizer)
    assert mode(tmp_path / "o") == kept
    loaded = fused.AdamW(**SETTINGS)
    fused.load_optimizer(tmp_path / "o", loaded)
    assert loaded.step.item() == 3


@pytest.mark.parametrize("target", ["old", "new"])
def test_a_symbolic_link_is_followed(target, tmp_path):
    (tmp_path / "far").mkdir()
    file, link = tmp_path / "far" / "file", tmp_path / "link"
    optimizer = saved(tmp_path / "far" / "file" if target == "old" else tmp_path / "other")
    link.symlink_to("far/file")
    (tmp_path / "link2").symlink_to(link)
    train(optimizer, tree(), [3])
    fused.save_optimizer(tmp_path / "link2", optimizer)
    assert link.is_symlink() and (tmp_path / "link2").is_symlink() and not file.is_symlink()
    assert os.listdir(tmp_path / "far") == ["file"]
    loaded = fused.AdamW(**SETTINGS)
    fused.load_optimizer(file, loaded)
    assert loaded.step.item() == 3


@pytest.mark.parametrize("name", ["o" * 255, "é" * 127, "o" * 243 + ".safetensors", "opt", "o.npz", "a b.ckpt"])
def test_the_file_has_exactly_the_name_that_is_given(name, tmp_path):
    saved(tmp_path / name)
    fused.load_optimizer(tmp_path / name, fused.AdamW(**SETTINGS))
    assert os.listdir(tmp_path) == [name]


def fails(path, kind, code):
    optimizer = fused.AdamW(**SETTINGS)
    with pytest.raises(kind) as caught:
        fused.save_optimizer(path, optimizer)
    assert caught.value.errno == code and caught.value.filename == str(path)


def test_what_cannot_be_opened_is_reported_under_the_name_that_is_given(tmp_path, monkeypatch):
    fails(tmp_path / "nowhere" / "o", FileNotFoundError, errno.ENOENT)
    fails(tmp_path / ("o" * 256), OSError, errno.ENAMETOOLONG)
    fails(tmp_path, IsADirectoryError, errno.EISDIR)
    (tmp_path / "file").write_text("")
    fails(tmp_path / "file" / "o", NotADirectoryError, errno.ENOTDIR)
    (tmp_path / "loop").symlink_to("loop")
    fails(tmp_path / "loop", OSError, errno.ELOOP)
    os.mkfifo(tmp_path / "pipe")
    fails(tmp_path / "pipe", OSError, errno.EINVAL)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    monkeypatch.chdir(tmp_path)
    fails("nowhere/o", FileNotFoundError, errno.ENOENT)
    assert sorted(os.listdir(tmp_path)) == ["file", "loop", "pipe"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    optimizer = saved(tmp_path / "o")
    before = (tmp_path / "o").read_bytes()
    train(optimizer, tree(), [3])

    def fail(*_):
        raise OSError(errno.ENOSPC, "no space")

    for name in ("replace", "fsync", "open"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, fail)
            with pytest.raises(OSError, match="No space left") as caught:
                fused.save_optimizer(tmp_path / "o", optimizer)
        assert caught.value.filename == str(tmp_path / "o")
        assert os.listdir(tmp_path) == ["o"] and (tmp_path / "o").read_bytes() == before
    with pytest.raises(FileNotFoundError):
        fused.load_optimizer(tmp_path / "none", optimizer)


LIMITED = """
import resource, signal, sys
import mlx.core as mx, mlx_fused_adam as fused
mx.set_default_device(mx.cpu)
optimizer = fused.Adam(1e-3)
optimizer.init({"w": mx.ones((300, 300))})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    fused.save_optimizer(sys.argv[1], optimizer)
except OSError as error:
    print(error)
"""


@pytest.mark.cpu_only
def test_a_full_disk_leaves_the_old_file(tmp_path):
    (tmp_path / "o").write_text("old")
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path / "o"], capture_output=True, text=True)
    assert f"[save_optimizer] {tmp_path / 'o'} cannot be written" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == ["o"] and (tmp_path / "o").read_text() == "old"


@pytest.fixture
def calls(monkeypatch):
    """What is done to the disk, in order; ``calls.answers`` are errors of fsync, by ``"file"`` or ``"folder"``."""

    class Calls(list):
        answers: dict[str, int] = {}

    made = Calls()
    fsync, replace = os.fsync, os.replace

    def of(handle):
        return "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"

    def flush(handle):
        made.append(f"fsync of {of(handle)}")
        if of(handle) in made.answers:
            raise OSError(made.answers[of(handle)], "fsync")
        fsync(handle)

    def rename(a, b):
        made.append("rename")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    return made


def test_the_file_is_on_the_disk_before_it_is_renamed(calls, tmp_path):
    saved(tmp_path / "o")
    assert calls == ["fsync of file", "rename", "fsync of folder"]


@pytest.mark.parametrize("code", ["EINVAL", "ENOTSUP", "EIO", "EACCES"])
def test_a_folder_that_cannot_be_flushed_is_no_error(code, calls, tmp_path):
    calls.answers = {"folder": getattr(errno, code)}
    saved(tmp_path / "o")
    assert calls[-1] == "fsync of folder"
    fused.load_optimizer(tmp_path / "o", fused.AdamW(**SETTINGS))


@pytest.mark.parametrize(("code", "is_error"), [("EINVAL", False), ("ENOTSUP", False), ("EIO", True)])
def test_a_file_that_cannot_be_flushed(code, is_error, calls, tmp_path):
    calls.answers = {"file": getattr(errno, code)}
    if is_error:
        with pytest.raises(OSError):
            saved(tmp_path / "o")
        assert not os.listdir(tmp_path)
    else:
        saved(tmp_path / "o")
        assert os.listdir(tmp_path) == ["o"]
