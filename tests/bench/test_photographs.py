"""Photographs are made of pictures that the other part lacks; a teacher looks at each view once."""

import torch
from PIL import Image
from torch import nn

from bench.labels import photographs, problems, real
from pipeline.data.index import Index
from pipeline.networks.models import Network


def pictures(folder):
    """14 scenes and as many things, each of one colour, and a drawing that is left out."""
    for i in range(28):
        path = folder / ("scenes" if i % 2 else "things") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = (8 * i, 255 - 8 * i, 100)
        image = Image.new("RGB" if i % 2 else "RGBA", (120, 110), colour if i % 2 else (*colour, 255))
        if not i % 2:
            image.putpixel((0, 0), (0, 0, 0, 0))
        image.save(path)
    (folder / "cartoon").mkdir()
    Image.new("RGB", (200, 200)).save(folder / "cartoon" / "drawn.png")


def test_the_parts_share_no_picture_and_are_a_function_of_the_seed(tmp_path):
    pictures(tmp_path / "in")
    parts = photographs.split(tmp_path / "in")
    assert [[len(kind) for kind in part] for part in parts.values()] == [[11, 11], [3, 3]]
    colours = [{image.getpixel((60, 60))[:3] for kind in part for image in kind} for part in parts.values()]
    assert not colours[0] & colours[1] and len(colours[0] | colours[1]) == 28
    for out in ("a", "b"):
        options = ["--out", str(tmp_path / out), "--train", "3", "--held-out", "2"]
        photographs.main([str(tmp_path / "in"), *options])
    made = {out: [path.read_bytes() for path in sorted((tmp_path / out).rglob("*.jpg"))] for out in ("a", "b")}
    assert made["a"] == made["b"] and len(set(made["a"])) == 5


class Tiny(nn.Module):
    """Says which parts of an image are bright, in five blocks as the real ones have seven."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([*(nn.AvgPool2d(2) for _ in range(4)), nn.Identity()])
        self.head = nn.Linear(3 * 10 * 10, real.CLASSES)
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        for block in self.blocks:
            images = block(images)
        return self.head(images.flatten(1))


def test_a_teacher_looks_once_and_goes_on_where_it_stopped(mixed: Index, tmp_path, monkeypatch):
    monkeypatch.setattr(real, "_PART", 40)
    torch.manual_seed(0)
    teacher = Tiny()
    network = Network(teacher, "tiny", real.CLASSES, (0.5,) * 3, (0.5,) * 3, "f")
    found = real.look(network, mixed, 2, tmp_path)
    good, asked = len(mixed.good), teacher.seen
    assert asked >= 4 * good
    assert found.pixels[1].shape == (good, 2, 3, 32, 32) and found.features[0].shape == (good, 2, 3 * 4)
    # A student's pixel is the mean of 25, a feature that of a quarter: both have the image's mean.
    whole = found.pixels[0].float().mean((3, 4)) / 127.5 - 1
    assert (found.features[0].unflatten(2, (3, 4)).mean(3) - whole).abs().max() < 0.02

    part = sorted(tmp_path.glob("views-*/1-*.npz"))[0]
    part.unlink()
    again = real.look(network, mixed, 2, tmp_path)
    assert teacher.seen - asked <= 2 * 40 + 1
    assert all(torch.equal(a, b) for a, b in zip(found.logits, again.logits, strict=True))


def test_a_small_student_answers_for_both_views():
    said = problems.Small()(torch.zeros(3, 2, 3, 32, 32, dtype=torch.uint8))
    assert said.shape == (3, 2, 1000)
