"""Found = used + quarantined + left out, whatever a folder or a tar holds."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.images import tar
from support.prepared import SMALL, samples

from cache.errors import UserError
from pipeline.data import prepare
from pipeline.data.ledger import Ledger
from pipeline.data.sources import tars
from pipeline.data.sources.base import Options
from pipeline.data.sources.folder import folder

DIRS = st.lists(st.sampled_from(["cat", "dog", ".git", "__MACOSX", "deep.er"]), max_size=3)
FILES = st.sampled_from(
    ["a.jpg", "b.PNG", "c.jfif", "d.webp", "e.txt", "f", ".g.jpg", "h.tar.gz", "i\n.jpg", "Thumbs.db"]
)
KINDS = st.sampled_from(["file"] * 6 + ["fifo", "dangling", "link", "loop", "folder"])


def place(entry) -> tuple[str, ...]:
    return *entry[0], entry[1]


TREES = st.lists(st.tuples(DIRS, FILES, KINDS), min_size=1, max_size=14, unique_by=place)
IMAGES = (".jpg", ".png", ".jfif", ".webp")


class Forgetful(Ledger):
    """A ledger to which nobody tells of one kind of file."""

    def __init__(self, reason: str):
        super().__init__()
        self.reason = reason

    def leave(self, place, reason, **more):
        if reason != self.reason:
            super().leave(place, reason, **more)


def grow(root: Path, tree) -> None:
    shutil.rmtree(root, ignore_errors=True)
    (root / "cat").mkdir(parents=True)
    (root.parent / "outside.jpg").write_bytes(SMALL)
    for parts, name, kind in tree:
        path = root.joinpath(*parts, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        match kind:
            case "file":
                path.write_bytes(b"x")
            case "fifo":
                os.mkfifo(path)
            case "folder":
                path.mkdir()
            case _:
                targets = {"dangling": "nowhere", "link": root.parent / "outside.jpg", "loop": "."}
                path.symlink_to(targets[kind])


@given(TREES)
@settings(deadline=None, max_examples=60)
def test_every_file_of_a_folder_is_accounted_for(tmp_path_factory, tree):
    """Against os.walk, which counts links to folders as folders; here each leads to the folder it lies in."""
    root = tmp_path_factory.getbasetemp() / "tree" / "root"
    grow(root, tree)
    lying = [
        os.path.join(place, name)
        for place, folders, files in os.walk(root)
        for name in (*files, *(name for name in folders if os.path.islink(os.path.join(place, name))))
    ]
    used = [
        path
        for path in lying
        if os.path.isfile(path)
        and path.lower().endswith(IMAGES)
        and len(parts := Path(path).relative_to(root).parts) > 1
        and not any(part.startswith(".") or part == "__MACOSX" for part in parts)
    ]
    ledger = Ledger()
    try:
        (source,) = folder(str(root), Options(), ledger).values()
    except UserError as error:
        assert not used and "no images in" in str(error)
    else:
        assert source.count == len(used) == ledger.used
        assert len({sample.key for sample in source.samples}) == len(used)
    ledger.close()
    assert ledger.found == len(lying) and ledger.left_out.total() == len(lying) - len(used)
    assert str(ledger) == f"{len(lying)} found = {len(used)} used + 0 quarantined + {len(lying) - len(used)} left out"
    for reason in ledger.left_out:
        forgetful = Forgetful(reason)
        try:
            folder(str(root), Options(), forgetful)
        except UserError:
            assert not used
        with pytest.raises(AssertionError, match="accounted for"):
            forgetful.close()


ODD = ("__meta__/x.txt", "d/c.cls", "../up.jpg", "é.webp", "." * 3, "x" * 120 + ".jpg", "x" * 120 + ".cls", "photo")
NAMES = st.sampled_from(
    ["a.jpg", "./a.cls", "a.cls", "b.jpg", "b.json", "b.txt", "v1.0.jpg", ".h.jpg", "d/._a.jpg", "d/c.jpg", *ODD]
)
TYPES = st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
PARTS = st.lists(st.tuples(NAMES, TYPES, NAMES), min_size=1, max_size=10, unique_by=lambda member: member[0])


def packed(members, format: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name, kind, target in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            content = b"1" if kind == tarfile.REGTYPE else b""
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


@given(
    st.lists(PARTS, min_size=1, max_size=3), st.sampled_from([b"", b"junk", bytes(600) + b"more junk" * 99]), st.data()
)
@settings(deadline=None, max_examples=150)
def test_every_member_of_a_tar_is_accounted_for(tmp_path_factory, parts, behind, data):
    """Against the lists that the tars were packed from, joined as `cat` does, with or without bytes behind them."""
    path = tmp_path_factory.getbasetemp() / "joined.tar"
    format = data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    path.write_bytes(b"".join(packed(members, format) for members in parts) + behind)
    lying = [name for members in parts for name, kind, _ in members if kind != tarfile.DIRTYPE]
    ledger = Ledger()
    try:
        with open(path, "rb") as file:
            found = tars.scan(file, "x.tar", ledger)
    except UserError as error:
        assert "duplicate key" in str(error)
        assume(False)
    else:
        ledger.close()
        assert ledger.found == len(lying) + bool(behind)
        assert ledger.used == sum(found.files) and found.cut is None
        assert ("bytes behind the end of a tar" in ledger.left_out) == bool(behind)
        for reason in ledger.left_out:
            forgetful = Forgetful(reason)
            with open(path, "rb") as file:
                tars.scan(file, "x.tar", forgetful)
            with pytest.raises(AssertionError, match="accounted for"):
                forgetful.close()


def test_what_turns_out_damaged_moves_from_used_to_quarantined(tmp_path, capsys):
    """Both files of each sample; the summary prints the identity and keeps it in ledger.json."""
    whole = [
        *samples(6),
        ("odd.jpg", b""),
        ("odd.cls", b"1"),
        ("notes.txt", b""),
        ("k0.txt", b""),
        ("no_label.jpg", SMALL),
    ]
    tar(tmp_path / "a.tar", whole)
    facts = prepare.build(f"webdataset:{tmp_path}", tmp_path / "out", threads=1)
    assert facts["files"] == {
        "found": 17,
        "used": 12,
        "quarantined": {"empty file": 2, "no image": 1, "no label": 1},
        "left_out": {"beside an image and its label": {"txt": 1}},
    }
    assert "files: 17 found = 12 used + 4 quarantined + 1 left out" in facts["notes"]
    assert "left out: 1 beside an image and its label: 1 txt ('k0.txt')" in facts["notes"]
    assert "quarantined: 1 (1 files): no label, found members jpg, key 'no_label'" in facts["notes"]
