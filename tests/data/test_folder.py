"""Folders of images: what is a class, what is read, and how classes are numbered."""

from pathlib import Path

from support.prepared import SMALL, refuse

from pipeline.data import prepare
from pipeline.data.classes import Classes
from pipeline.data.index import Index


def grown(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(SMALL)
    return root


def test_the_parent_of_splits_is_refused_and_a_class_called_train_is_not(tmp_path):
    root = grown(tmp_path / "a", "train/cat/1.jpg", "Val/cat/1.jpg")
    refuse(f"imagefolder:{root}", tmp_path / "out", "look like splits", f"give {root}/train")
    root = grown(tmp_path / "b", "train/1.jpg", "val/1.jpg")
    assert prepare.build(f"imagefolder:{root}", tmp_path / "out", threads=1)["classes"] == 2
    root = grown(tmp_path / "c", "train/cat/1.jpg", "bus/cat/1.jpg")
    assert prepare.build(f"imagefolder:{root}", tmp_path / "more", threads=1)["classes"] == 2


def test_linked_folders_are_followed_once_and_circles_end(tmp_path):
    root = grown(tmp_path / "root", "cat/real/1.jpg", "dog/1.jpg")
    grown(tmp_path, "pool/2.jpg", "pool/inner/3.jpg")
    for link, target in (
        ("cat/a_pool", "../../pool"), ("cat/b_pool", "../../pool"), ("cat/a_real", "real"), ("cat/up", ".."),
        ("fox", "../pool/inner"), ("cat/self", "self"),
    ):  # fmt: skip
        (root / link).symlink_to(target)
    (tmp_path / "pool" / "back").symlink_to("..")
    facts = prepare.build(f"imagefolder:{root}", tmp_path / "out", threads=1)
    data = Index.open(tmp_path / "out")
    keys = {data.key(row): data.class_list.name(data.records["label"][row]) for row in range(len(data))}
    pool = next(key.split("/")[1] for key in keys if "_pool" in key)
    expected = {
        "cat/real/1": "cat",
        f"cat/{pool}/2": "cat",
        f"cat/{pool}/inner/3": "cat",
        "dog/1": "dog",
        "fox/3": "fox",
    }
    assert keys == expected
    assert facts["files"]["left_out"] == {
        "a linked folder that is read already": {"link": 4},
        "a link that leads nowhere": {"link": 1},
    }


def test_class_folders_are_numbered_and_joined_as_the_user_says(tmp_path):
    root = grown(tmp_path / "root", *(f"{name}/{i}.jpg" for name in ("1", "2", "10") for i in range(2)))
    facts = prepare.build(f"imagefolder:{root}", tmp_path / "lexical", threads=1)
    assert Index.open(tmp_path / "lexical").class_list == Classes(3, ("1", "10", "2"), "lexical")
    assert any("1, 10, 2" in note and "1, 2, 10" in note and "--class-order" in note for note in facts["notes"])
    prepare.build(f"imagefolder:{root}", tmp_path / "natural", threads=1, class_order="natural")
    assert Index.open(tmp_path / "natural").class_list == Classes(3, ("1", "2", "10"), "natural")
    (tmp_path / "map.yaml").write_text("1: odd\n2: even\n10: even")
    prepare.build(f"imagefolder:{root}", tmp_path / "mapped", threads=1, class_map=tmp_path / "map.yaml")
    data = Index.open(tmp_path / "mapped")
    assert data.class_list.names == ("even", "odd")
    assert {data.key(row)[:2]: data.records["label"][row] for row in range(6)} == {"1/": 1, "2/": 0, "10": 0}
    (tmp_path / "order.txt").write_text("1\n2\n")
    order = str(tmp_path / "order.txt")
    refuse(f"imagefolder:{root}", tmp_path / "out", "lacks a class", "'10' in the source", class_order=order)
    refuse("digits", tmp_path / "out", "has classes of its own", "drop --class-order", class_order="natural")
    refuse("webdataset:x.tar", tmp_path / "out", "no shard matches", class_order="natural")
