"""Tars are read whole, links in them are followed, and labels are taken in every form that is a class."""

import io
import tarfile
from pathlib import Path

import pytest
from support.images import tar
from support.prepared import SMALL, refuse, samples

from pipeline.data import prepare
from pipeline.data.index import Index
from pipeline.data.ledger import Ledger
from pipeline.data.sources import tars


def scan(path: Path, ledger: Ledger | None = None) -> tars.Scan:
    with open(path, "rb") as file:
        return tars.scan(file, str(path), ledger or Ledger())


def test_tars_are_read_to_their_last_byte(tmp_path):
    """Joined as `cat` does, with a lone block of zeros between, and with bytes behind; the keys say what was read."""
    for name in "abc":
        tar(tmp_path / f"{name}.tar", samples(2, name))
    parts = [(tmp_path / f"{name}.tar").read_bytes() for name in "abc"]
    (tmp_path / "joined.tar").write_bytes(
        parts[0] + parts[1].rstrip(b"\0").ljust(len(parts[1]) // 512 * 512, b"\0") + parts[2]
    )
    ledger = Ledger()
    found = scan(tmp_path / "joined.tar", ledger)
    assert found.keys == ["a0", "a1", "b0", "b1", "c0", "c1"] and found.cut is None and ledger.found == 12
    (tmp_path / "behind.tar").write_bytes(parts[0] + b"junk")
    ledger = Ledger()
    found = scan(tmp_path / "behind.tar", ledger)
    assert found.keys == ["a0", "a1"] and ledger.left_out == {"bytes behind the end of a tar": 1}
    assert "of 4 bytes" in ledger.lines()[0]
    (tmp_path / "cut.tar").write_bytes(parts[0] + parts[1][:3000])
    found = scan(tmp_path / "cut.tar")
    assert found.keys == ["a0", "a1", "b0"] and found.cut == "tar ends early"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_lead_to_members_of_the_same_tar(tmp_path, kind):
    """Also those that stand before what they lead to, and links to links; the rest is left out, and said."""
    up = "../" if kind == tarfile.SYMTYPE else ""
    links = {
        "l/one.jpg": f"{up}k0.jpg",
        "l/one.cls": f"{up}k1.cls",
        "m/two.jpg": f"{up}l/one.jpg",
        "m/two.cls": f"{up}k2.cls",
    }
    links |= {"away.jpg": "/etc/passwd", "round.jpg": "round.jpg"}
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name, target in links.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            file.addfile(member)
        for name, data in samples(3):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    facts = prepare.build(f"webdataset:{tmp_path}/a.tar", tmp_path / "out", threads=1)
    data = Index.open(tmp_path / "out")
    assert [data.key(row) for row in range(len(data))] == ["l/one", "m/two", "k0", "k1", "k2"]
    assert data.records["label"].tolist() == [1, 2, 0, 1, 2] and data.read(1) == SMALL
    assert (
        facts["files"]["left_out"] == {"a link that leads out of the tar": {"jpg": 2}} and facts["files"]["found"] == 12
    )


def test_a_sample_is_one_with_and_without_dot_slash(tmp_path):
    tar(tmp_path / "a.tar", [("./x.jpg", SMALL), ("x.cls", b"1"), (".//y.jpg", SMALL), (".//y.cls", b"0")])
    assert scan(tmp_path / "a.tar").records["label"].tolist() == [1, 0]
    tar(tmp_path / "b.tar", [("x.jpg", SMALL), ("x.cls", b"1")])
    refuse(f"webdataset:{tmp_path}/*.tar", tmp_path / "out", "duplicate key 'x'", "a.tar and in", "b.tar")


def test_labels_may_be_names_where_the_user_lists_or_maps_them(tmp_path):
    names = ["blue", "red", "cafe\u0301", "rouge"]
    tar(tmp_path / "a.tar", [m for n in names for m in ((f"{n}.jpg", SMALL), (f"{n}.cls", n.encode()))])
    refuse(f"webdataset:{tmp_path}/a.tar", tmp_path / "out", "found 'blue'", "--class-order FILE")
    (tmp_path / "order.txt").write_text("red\nblue\ncafé\nnone\n")
    (tmp_path / "map.yaml").write_text("rouge: red")
    options = {"class_order": str(tmp_path / "order.txt"), "class_map": tmp_path / "map.yaml"}
    facts = prepare.build(f"webdataset:{tmp_path}/a.tar", tmp_path / "out", threads=1, **options)
    data = Index.open(tmp_path / "out")
    assert data.records["label"].tolist() == [1, 0, 2, 0] and data.class_list.names == ("red", "blue", "café", "none")
    assert "note: 1 of 4 classes have no sample: none" in facts["notes"]
    (tmp_path / "map.yaml").write_text("blue: 0\nred: 1\nrouge: 1\ncafé: 2")
    prepare.build(f"webdataset:{tmp_path}/a.tar", tmp_path / "mapped", threads=1, class_map=tmp_path / "map.yaml")
    assert Index.open(tmp_path / "mapped").records["label"].tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        ([0, 1, 2, 255], "252 of 256 classes have no sample: 3, 4, 5, 6, 7, 8, …"),
        ([1, 2, 3], "1 of 4 classes have no sample: 0; no sample has label 0"),
        ([0, 0, 0], "all samples are of one class"),
    ],
)
def test_odd_labels_are_said(tmp_path, labels, note):
    tar(tmp_path / "a.tar", [m for i, n in enumerate(labels) for m in ((f"{i}.jpg", SMALL), (f"{i}.cls", b"%d" % n))])
    facts = prepare.build(f"webdataset:{tmp_path}/a.tar", tmp_path / "out", threads=1)
    assert any(f"note: {note}" in line for line in facts["notes"])
