"""A decoder is known by its pixels: others are refused before the first batch, another version's equal ones are not."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

import cache
from cache import UserError
from pipeline.config import PrecomputeTeacher
from pipeline.data import dali, probes
from pipeline.demo import POLICY
from pipeline.labels import precompute
from pipeline.labels.epochs import replayed


def test_each_probe_is_what_its_name_says():
    """By Pillow, an independent reader of their headers."""
    found = {name: Image.open(io.BytesIO(data)) for name, data in probes.PROBES.items()}
    sampled = {name: JpegImagePlugin.get_sampling(image) for name, image in found.items() if image.mode == "RGB"}
    assert {name: image.mode for name, image in found.items() if image.mode != "RGB"} == {"gray": "L", "CMYK": "CMYK"}
    assert (sampled["4:4:4"], sampled["4:2:2"], sampled["baseline"]) == (0, 1, 2)
    assert sampled["odd sides"] == 2 and all(side % 2 for side in found["odd sides"].size)
    assert [name for name, image in found.items() if "progressive" in image.info] == ["progressive"]
    assert [name for name, data in probes.PROBES.items() if b"\xff\xdd" in data] == ["restart markers"]


def test_every_decoder_here_gives_pillows_pixels(monkeypatch):
    """On a CPU image by image and by batches, both over libjpeg-turbo, which Pillow calls too."""
    by_pillow = {name: Image.open(io.BytesIO(data)).convert("RGB") for name, data in probes.PROBES.items()}
    seen = []
    monkeypatch.setattr(probes.zlib, "crc32", lambda data: seen.append(data) or 0)
    for decoder, copies in (("cpu", 1), ("gpu", 1), ("gpu-both", 2)):
        seen.clear()
        probes.pixels.__wrapped__(decoder)
        for image, data in zip(by_pillow.values(), seen, strict=True):
            assert data == np.asarray(image).tobytes() * copies


@pytest.mark.parametrize("decoder", ["cpu", *dali.ENGINES])
def test_an_identity_names_its_decoder(decoder):
    identity = probes.identity(decoder)
    assert probes.decoder_of(identity) == decoder
    assert probes.decoder_of({k: v for k, v in identity.items() if k != "pixels"}) == decoder
    with pytest.raises(UserError, match=r"unknown decoder; found .*'backend': 'x'"):
        probes.decoder_of(identity | {"backend": "x"})


def test_equal_pixels_of_another_version_are_accepted_and_other_pixels_refused(labels):
    manifest = cache.open(labels).manifest
    assert manifest.decoder["pixels"] == probes.pixels("cpu") and "dali" in manifest.versions["decoding"]
    older = dataclasses.replace(manifest, versions={"decoding": "dali 1.50.0"})
    assert replayed(older)[1] == "cpu"
    other = manifest.decoder | {"pixels": manifest.decoder["pixels"] | {"progressive": "00000000"}}
    message = (
        r"other pixels than the store's \(cpu: progressive\); found .*, expected the pixels of dali 1\.50\.0; fix: "
    )
    with pytest.raises(UserError, match=message):
        replayed(dataclasses.replace(older, decoder=other))


def test_a_store_from_before_there_were_probes_stays_readable_and_growable(
    labels, digits, teacher, tmp_path, monkeypatch
):
    options = dict(data=digits / "train", teacher=teacher, store=str(tmp_path / "s.zarr"), policy=POLICY, codec="int8")
    config = PrecomputeTeacher(**options, views=1, block_rows=64, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(precompute.probes, "identity", probes._settings)
        precompute.run(config)
    made = cache.open(config.store).manifest
    assert "pixels" not in made.decoder and replayed(made)[1] == "cpu"
    precompute.run(dataclasses.replace(config, views=2))
    assert not cache.open(config.store).missing_blocks() and cache.open(config.store).manifest.views == 2
