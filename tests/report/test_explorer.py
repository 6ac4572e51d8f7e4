import base64
import re
from importlib.resources import files

import numpy as np
import pytest
from tests.report.damage_kit import add_damage, made_up, resample
from tests.report.test_page import contrast, dumped

from secateur import report


def explored(run):
    return next(s for s in report.build(run).sections if s.title == "Features").explorer


def unpacked(explorer, name):
    packed = next(array for array in explorer.arrays if array.name == name)
    return packed, np.frombuffer(base64.b64decode(packed.data), np.dtype(packed.type).newbyteorder("<")).reshape(
        packed.shape
    )


@pytest.fixture
def sampled(make_run):
    """A run of three networks with samples made up by a function of options, and its arrays."""

    def make(names=None, change=None, **options):
        run = add_damage(make_run(), names=names, others=("wanda",))
        arrays = made_up(**{"n": 300, "networks": 3, "classes": 3, "side": 8, **options})
        arrays = change(arrays) or arrays if change else arrays
        resample(run, lambda _: arrays)
        return run, arrays

    return make


def test_metrics_are_exact_and_places_within_half_a_step(sampled):
    def spoil(arrays):
        arrays["margin"][1, :3] = np.nan, np.inf, -np.inf
        arrays["tsne"][0, 5] = np.nan

    run, arrays = sampled(change=spoil)
    found = explored(run)
    for name in ("confidence", "angle", "length", "margin"):
        assert np.array_equal(unpacked(found, name)[1], arrays[name], equal_nan=True)
    for name in ("index", "targets", "predictions"):
        assert np.array_equal(unpacked(found, name)[1], arrays[name])
    for name in ("pca", "pca_own", "tsne"):
        packed, steps = unpacked(found, name)
        low, high = np.array(packed.ranges).reshape(3, 1, 2, 2).transpose(3, 0, 1, 2)
        again = np.where(steps == 65535, np.nan, low + (high - low) * steps.astype(float) / 65534)
        worst = np.abs(again - arrays[name])
        assert np.array_equal(np.isnan(again), np.isnan(arrays[name]))
        assert np.nanmax(worst - 0.501 * (high - low) / 65534) <= 0


def test_every_sample_has_its_picture_on_the_sheet_until_it_is_full(sampled, monkeypatch):
    pytest.importorskip("PIL.Image")
    run, arrays = sampled(pictures="noise")
    assert pictures_agree(explored(run), arrays) == 300
    monkeypatch.setattr("secateur.report.views.features.BYTES", 5000)
    found = explored(run)
    assert 20 < pictures_agree(found, arrays) < 100 and len(base64.b64decode(found.sheet.data[22:])) <= 5000
    assert any(f"pictures of {found.sheet.count} of the samples" in line for line in found.more)
    place, flipped = unpacked(found, "place")[1], (arrays["predictions"] != arrays["predictions"][0]).any(0)
    assert not (place[~flipped] >= 0).any() or (place[flipped] >= 0).all()


def pictures_agree(found, arrays):
    """Compares each picture of the sheet with the sample's, and counts them."""
    import io

    from PIL import Image

    whole = np.asarray(Image.open(io.BytesIO(base64.b64decode(found.sheet.data[22:]))))
    place, sheet = unpacked(found, "place")[1], found.sheet
    for i in np.flatnonzero(place >= 0):
        y, x = place[i] // sheet.across * sheet.height, place[i] % sheet.across * sheet.width
        assert np.array_equal(whole[y : y + sheet.height, x : x + sheet.width], arrays["images"][i, :, :, 0])
    assert sorted(place[place >= 0]) == list(range(sheet.count))
    return sheet.count


def test_the_gallery_shows_changed_answers_and_the_surest_first(sampled):
    run, arrays = sampled(n=500)
    gallery = next(s for s in report.build(run).sections if s.title == "Changed answers: wanda").gallery
    answers, targets = arrays["predictions"], arrays["targets"]
    rows = [int(item.name.rpartition(" ")[2]) // 3 for item in gallery.items]
    assert len(rows) == len(set(rows)) == 60
    kinds = []
    for item, row in zip(gallery.items, rows, strict=True):
        before, after = item.answers
        assert answers[0, row] != answers[2, row]
        assert (before.answer, after.answer) == tuple(f"kind {answers[v, row]}" for v in (0, 2))
        assert item.label == f"kind {targets[row]}" and after.confidence == arrays["confidence"][2, row]
        assert after.right == (answers[2, row] == targets[row]) and item.picture.startswith("data:image/png")
        kinds.append((not before.right, not after.right, -after.confidence))
    lost = [kind for kind in kinds if not kind[0]]
    assert kinds[: len(lost)] == sorted(lost)


def test_without_pictures_or_places_the_rest_is_shown(sampled):
    run, _ = sampled(change=lambda arrays: {k: v for k, v in arrays.items() if k != "images"})
    found = explored(run)
    assert found.sheet is None and any("no pictures" in line for line in found.more)
    run, _ = sampled(
        names=("a", "b", "c"), change=lambda a: {k: v for k, v in a.items() if k not in ("pca", "pca_own", "tsne")}
    )
    assert explored(run) is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_classes_can_be_told_from_the_ground_and_from_points_that_are_not_selected(scheme):
    folder = files("secateur.report").joinpath("assets")
    block = folder.joinpath("explore.css").read_text().split("prefers-color-scheme: dark")[scheme == "dark"]
    paper = folder.joinpath("page.css").read_text().split("prefers-color-scheme: dark")[scheme == "dark"]
    ground = re.search(r"--paper: (#[0-9a-f]{6})", paper)[1]
    colours = dict(re.findall(r"--([kq]\d|none): (#[0-9a-f]{6})", block))
    faint = re.search(r"--faint: (#[0-9a-f]{6})", block)[1]
    assert len(colours) == 19 and contrast(faint, ground) >= 1.6
    for name, colour in colours.items():
        assert contrast(colour, ground) >= 3 and contrast(colour, faint) >= 1.75, name


def test_the_policy_allows_the_scripts_of_the_page_and_no_other(sampled, tmp_path):
    run, _ = sampled()
    page = report.write(run)
    dom, console = dumped(page, tmp_path, "--virtual-time-budget=20000")
    assert console == [] and dom.count('class="stage"') == 2
    page.write_text(page.read_text().replace("</body>", "<script>document.title = 'run'</script></body>"))
    dom, console = dumped(page, tmp_path, "--virtual-time-budget=5000")
    assert "<title>run</title>" not in dom and any("Content Security Policy" in line for line in console)
