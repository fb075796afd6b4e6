"""Images in files: what comes does not depend on who decodes it, and what is wrong with a folder is one line."""

from __future__ import annotations

import shutil
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import Flowers102, OxfordIIITPet
from torchvision.transforms import v2

from bisam.experiments.data import image_files, image_folders, load
from bisam.experiments.data.image_files import Folder
from bisam.experiments.data.image_folders import flowers, folder, imagenet, pets
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.machine import Machine

CPU = torch.device("cpu")


def write(path: Path, size: tuple[int, int] = (24, 18), mode: str = "RGB", **options) -> Path:
    """Noise, of a seed that is the path's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(list(path.name.encode())).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def classes(root: Path, ending: str = ".png", **counts: int) -> Path:
    """`root/CLASS/CLASS0.png` and so on, so many of each class."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            write(root / name / f"{name}{i}{ending}")
    return root


@pytest.fixture
def split(tmp_path) -> Folder:
    paths = [str(write(tmp_path / f"{i}.jpg", (20 + i, 16))) for i in range(7)]
    return Folder(paths, torch.tensor([0, 1, 2, 0, 1, 2, 0]), image_size=8, training=True)


def images(batches) -> torch.Tensor:
    return torch.cat([x for x, _ in batches])


def names(part: Folder) -> list[str]:
    return [Path(path).name for path in part.paths]


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_an_image_for_evaluation_is_what_torchvision_makes_of_it(tmp_path):
    path = write(tmp_path / "a.png", (300, 260))
    (x, y) = next(Folder([str(path)], torch.tensor([3])).batches(4))
    reference = v2.Compose(
        [
            v2.Resize(256, antialias=True),
            v2.CenterCrop(224),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    torch.testing.assert_close(x[0], reference(Image.open(path)).as_subclass(torch.Tensor), atol=1e-6, rtol=0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in Folder([str(path)], torch.tensor([3])).statistics)
    pixels = v2.Compose(reference.transforms[:4])(Image.open(path)).as_subclass(torch.Tensor)
    torch.testing.assert_close(x[0] * std + mean, pixels, atol=1e-6, rtol=0)
    assert x.shape == (1, 3, 224, 224)
    assert y.tolist() == [3]
    assert y.dtype == torch.int64


def test_training_images_are_a_function_of_what_the_generator_drew(split):
    first, again, other = (list(split.batches(3, seeded(seed))) for seed in (1, 1, 2))
    assert [len(y) for _, y in first] == [3, 3, 1]
    assert all(torch.equal(a, b) and torch.equal(u, v) for (a, u), (b, v) in zip(first, again, strict=True))
    assert not torch.equal(images(first), images(other))
    # The next epoch of the same generator is another one, and comes again where its state is restored.
    generator = seeded()
    list(split.batches(3, generator))
    state = generator.get_state()
    second = images(split.batches(3, generator))
    assert not torch.equal(second, images(first))
    assert torch.equal(images(split.batches(3, torch.Generator().set_state(state))), second)


def test_without_a_generator_images_come_in_order_and_always_the_same(split):
    labels = torch.cat([y for _, y in split.batches(2)])
    assert labels.tolist() == split.labels.tolist()
    assert torch.equal(images(split.batches(2)), images(split.batches(5)))
    # Each has a draw of its own: the same file twice is two crops.
    twice = next(Folder(split.paths[:1] * 2, split.labels[:2], 8, training=True).batches(2))[0]
    assert not torch.equal(*twice)


@pytest.mark.slow
def test_processes_change_nothing_and_name_what_they_cannot_read(split):
    apart = Folder(split.paths, split.labels, 8, training=True, processes=2)
    state = torch.get_rng_state()
    here, there = list(split.batches(2, seeded())), list(apart.batches(2, seeded()))
    assert len(here) == len(there) == 4
    assert all(torch.equal(a, b) and torch.equal(u, v) for (a, u), (b, v) in zip(here, there, strict=True))
    next(apart.batches(2))  # and is left
    assert torch.equal(torch.get_rng_state(), state)

    Path(split.paths[3]).write_bytes(Path(split.paths[3]).read_bytes()[:400])
    for damaged in (split, apart):
        with pytest.raises(ValueError, match=r"^/.*/3\.jpg cannot be read \(.*\): replace or delete it$") as error:
            list(damaged.batches(2))
        assert "\n" not in str(error.value)


def test_the_global_generator_and_the_given_one_are_left_alone(split):
    state = torch.get_rng_state()
    one, other = seeded(), seeded()
    list(split.batches(2, one))
    split.batches(2, other)  # all is drawn at once, whoever reads on
    assert torch.equal(one.get_state(), other.get_state())
    list(split.batches(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("ranks", "size", "lost"), [(2, 4, 1), (3, 3, 1), (2, 7, 1), (7, 7, 0)])
def test_ranks_share_batches(split, ranks, size, lost):
    whole = list(split.batches(size, seeded()))
    parts = [list(split.batches(size, seeded(), rank, ranks)) for rank in range(ranks)]
    seen = [image for part in parts for image in images(part)]
    everything = images(whole)
    assert len(seen) == len(split) - lost
    assert len({tuple(image.flatten().tolist()) for image in seen}) == len(seen)
    assert all((everything == image).flatten(1).all(1).any() for image in seen)
    assert len({tuple(len(y) for _, y in part) for part in parts}) == 1


def test_first_relabelled_and_to(split):
    assert len(split.first(3)) == 3
    assert torch.equal(images(split.first(3).batches(2)), images(split.batches(2))[:3])
    assert len(split.first(100)) == 7
    some = split.chosen(torch.tensor([4, 0]))
    assert (names(some), some.labels.tolist()) == (["4.jpg", "0.jpg"], [1, 0])
    whole = replace(split, training=False)
    assert torch.equal(images(split.unaugmented().batches(4)), images(whole.batches(4)))
    assert not torch.equal(images(split.batches(4)), images(whole.batches(4)))
    noisy = split.relabelled(split.labels + 5)
    assert torch.cat([y for _, y in noisy.batches(4)]).tolist() == (split.labels + 5).tolist()
    x, y = next(split.to(torch.device("meta")).batches(4))
    assert x.device.type == y.device.type == "meta"
    assert split.device == CPU


@pytest.mark.parametrize("wrong", [{"image_size": 0}, {"processes": -1}])
def test_settings_outside_their_range_are_refused(split, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least"):
        Folder(split.paths, split.labels, **wrong)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    ending = {"CMYK": ".jpg", "YCbCr": ".tif"}.get(mode, ".png")
    path = write(tmp_path / f"a{ending}", mode=mode)
    x, _ = next(Folder([str(path)], torch.zeros(1, dtype=torch.int64), 16).batches(1))
    assert x.shape == (1, 3, 16, 16)
    if mode in ("1", "L", "LA"):
        grey = x[0] * torch.tensor(image_files.STD)[:, None, None] + torch.tensor(image_files.MEAN)[:, None, None]
        torch.testing.assert_close(grey[0], grey[1], atol=1e-5, rtol=0)
        assert grey.std() > 0.05


def test_transparency_in_a_palette_makes_no_warning(tmp_path):
    path = write(tmp_path / "a.png", mode="P", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_files.decoded(str(path)).mode == "RGB"


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path):
    Image.fromarray(np.array([[0, 256, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(image_files.decoded(str(tmp_path / "a.png")))[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (300, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_images_of_any_size_fit(tmp_path, size, training):
    path = write(tmp_path / "a.png", size)
    x, _ = next(Folder([str(path)], torch.zeros(1, dtype=torch.int64), 9, training).batches(1))
    assert x.shape == (1, 3, 9, 9)


LAYOUTS = {
    "three parts": ({"train": 4, "val": 2, "test": 3}, [8, 4, 6]),
    "valid": ({"train": 4, "valid": 2, "test": 3}, [8, 4, 6]),
    "no val": ({"train": 10, "test": 3}, [18, 2, 6]),
    "no test": ({"train": 10, "val": 3}, [18, 2, 6]),
    "train alone": ({"train": 10}, [16, 2, 2]),
    "classes": ({"": 10}, [16, 2, 2]),
    "classes, uneven": ({"": 8}, [13, 2, 1]),
}


@pytest.mark.parametrize(("parts", "lengths"), LAYOUTS.values(), ids=LAYOUTS)
def test_what_is_not_there_is_held_out(tmp_path, parts, lengths):
    for part, count in parts.items():
        classes(tmp_path / part, a=count, b=count)
    data = folder(tmp_path, 0, 8)
    splits = (data.train, data.validation, data.test)
    assert [len(split) for split in splits] == lengths
    assert data.classes == 2
    assert [split.training for split in splits] == [True, False, False]
    paths = [path for split in splits for path in split.paths]
    assert len(set(paths)) == len(paths) == 2 * sum(parts.values())
    for split in splits:
        assert [Path(path).parent.name for path in split.paths] == ["ab"[label] for label in split.labels.tolist()]
    again = folder(tmp_path, 0, 8)
    assert names(again.validation) == names(data.validation)
    for split in (data.validation, data.test):
        counts = Counter(split.labels.tolist())
        assert counts[0] - counts[1] in (-1, 0, 1)


@pytest.mark.parametrize(("parts", "lengths"), LAYOUTS.values(), ids=LAYOUTS)
def test_the_seed_draws_what_is_held_out_and_nothing_else(tmp_path, parts, lengths):
    for part, count in parts.items():
        classes(tmp_path / part, a=count, b=count)
    one, other = (folder(tmp_path, seed, 8) for seed in (1, 2))
    there = {"val": "validation", "valid": "validation", "test": "test", "train": "train"}
    given = {there[part] for part in parts if part} - ({"train"} if len(parts) < 3 else set())
    if given == {"validation"}:  # without a test folder the validation images are the test part
        given = {"test"}
    for part in ("train", "validation", "test"):
        first, second = getattr(one, part), getattr(other, part)
        assert (first.paths == second.paths) == (part in given)
    assert [len(part) for part in (other.train, other.validation, other.test)] == lengths
    assert not set(other.train.paths) & {*other.validation.paths, *other.test.paths}


def test_holding_out_leaves_each_class_in_training(tmp_path):
    data = folder(classes(tmp_path, a=4, b=1, c=4, d=1, e=13, f=2), 0, 8)  # b and d are where others would be held out
    assert set(data.train.labels.tolist()) == {0, 1, 2, 3, 4, 5}
    assert (len(data.validation), len(data.test)) == (2, 1)


def test_the_first_examples_are_of_all_classes(tmp_path):
    data = folder(classes(tmp_path, a=20, b=20, c=20), 0, 8)
    assert set(data.train.first(12).labels.tolist()) == {0, 1, 2}


def test_files_within_folders_count_and_other_files_do_not(tmp_path):
    classes(tmp_path, a=10, b=10)
    write(tmp_path / "a" / "deeper" / "more.JPEG", format="jpeg")
    for name in ("notes.txt", ".DS_Store", "._a0.png"):
        (tmp_path / "b" / name).write_text("no image")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README.md").write_text("no image")
    data = folder(tmp_path, 0, 8)
    assert sum(len(split) for split in (data.train, data.validation, data.test)) == 21
    assert data.classes == 2


def test_a_class_may_be_called_train(tmp_path):
    data = folder(classes(tmp_path, train=10, plane=10), 0, 8)
    assert data.classes == 2
    assert len(data.train) == 16


def nothing(root: Path) -> None: ...


def is_a_file(root: Path) -> None:
    root.write_text("")


def is_empty(root: Path) -> None:
    root.mkdir()


def flat(root: Path) -> None:
    write(root / "train" / "cat.0.jpg")
    write(root / "test" / "1.jpg")


def one_class(root: Path) -> None:
    classes(root / "images", a=10, b=10)


def empty_classes(root: Path) -> None:
    classes(root, a=10, b=0, c=10, d=0)
    (root / "b" / "notes.txt").write_text("")


def unknown_class(root: Path) -> None:
    classes(root / "train", a=10, b=10)
    classes(root / "test", a=2, c=2)


def class_without_test(root: Path) -> None:
    classes(root / "train", a=10, b=10)
    classes(root / "test", a=2)
    write(root / "test" / "z" / "0.png")


def too_few(root: Path) -> None:
    classes(root, a=2, b=2)


def no_train(root: Path) -> None:
    classes(root / "test", a=2, b=2)


REFUSED = [
    (nothing, r"ROOT cannot be read \(No such file or directory\): give a folder with a folder for each class"),
    (is_a_file, r"ROOT cannot be read \(Not a directory\): give a folder with a folder for each class"),
    (is_empty, r"ROOT has no class folders: put the images of each class into a folder of its own, ROOT/CLASS/\*\.jpg"),
    (flat, r"ROOT/train has no class folders: .* ROOT/train/CLASS/\*\.jpg"),
    (one_class, r"ROOT has one class folder, images: put the images of each class into a folder of its own, .*"),
    (
        empty_classes,
        r"2 of 4 class folders in ROOT have no images: b, d: put images there \(\.jpg, .*\), or delete them",
    ),
    (
        unknown_class,
        r"the parts of ROOT have different classes, b only in train and c only in test: give each the same .*",
    ),
    (class_without_test, r"the parts of ROOT have different classes, b only in train and z only in test: .*"),
    (too_few, r"ROOT has 4 images, too few to hold some out: add images, or val and test folders"),
    (no_train, r"ROOT has test and no train: put the training images into ROOT/train/CLASS/"),
]


@pytest.mark.parametrize(("make", "line"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_folder_that_is_no_data_set_is_refused_in_one_line(tmp_path, make, line):
    root = tmp_path / "x"
    make(root)
    with pytest.raises(ValueError, match=f"^{line.replace('ROOT', str(root))}$"):
        folder(root, 0, 8)


def test_unreadable_images_are_counted_and_named(tmp_path):
    classes(tmp_path, ".jpg", a=10, b=10)
    classes(tmp_path, c=10)
    (tmp_path / "a" / "a3.jpg").write_bytes(b"")
    (tmp_path / "b" / "b0.jpg").write_bytes((tmp_path / "b" / "b1.jpg").read_bytes()[:-60])
    (tmp_path / "b" / "b9.jpg").write_text("<html>404</html>")
    png = (tmp_path / "c" / "c4.png").read_bytes()
    (tmp_path / "c" / "c4.png").write_bytes(png[: len(png) // 2])
    shutil.copy(tmp_path / "c" / "c5.png", tmp_path / "c" / "c6.jpg")  # a PNG by another name is one
    with open(tmp_path / "a" / "a1.jpg", "ab") as file:
        file.write(b"a tail that harms nobody")
    line = r"4 of 31 images in .* cannot be read: a/a3\.jpg, b/b0\.jpg, b/b9\.jpg, c/c4\.png: replace or delete them"
    with pytest.raises(ValueError, match=f"^{line}$"):
        folder(tmp_path, 0, 8)
    for name in ("a/a0.jpg", "a/a2.jpg", "b/b1.jpg"):
        (tmp_path / name).write_text("no image")
    with pytest.raises(
        ValueError, match=r"7 of 31 .*: a/a0\.jpg, a/a2\.jpg, a/a3\.jpg, b/b0\.jpg, b/b1\.jpg, \.\.\.: re"
    ):
        folder(tmp_path, 0, 8)


def test_of_many_images_none_is_looked_at_up_front(tmp_path, monkeypatch):
    monkeypatch.setattr(image_folders, "CHECKED", 5)
    classes(tmp_path, a=10, b=10)
    for path in tmp_path.glob("?/*"):
        path.write_text("no image")
    data = folder(tmp_path, 0, 8)
    with pytest.raises(ValueError, match=r"/[ab]/[ab]\d\.png cannot be read \(cannot identify image file .*"):
        next(data.train.batches(4))


def test_imagenet(tmp_path):
    classes(tmp_path / "imagenet" / "train", ".JPEG", n01440764=60, n01443537=40)
    classes(tmp_path / "imagenet" / "val", ".JPEG", n01440764=3, n01443537=3)
    flat(tmp_path / "imagenet" / "test")  # the official one has no labels
    data = imagenet(tmp_path, 0, 8)
    assert (len(data.train), len(data.validation), len(data.test)) == (98, 2, 6)
    assert data.classes == 2
    assert data.train.training
    assert data.metrics == ("accuracy", "top5")
    assert next(data.test.batches(6))[0].shape == (6, 3, 8, 8)


@pytest.mark.skipif(find_spec("timm") is None, reason="no timm")
def test_a_network_of_timm_sees_images_as_it_was_trained_with(tmp_path):
    classes(tmp_path / "mine", cat=20, dog=20)
    recipe = Recipe(dataset=f"folder:{tmp_path / 'mine'}", model="torchvision:resnet18", image_size=8)
    one, other = (load(replace(recipe, model=name), Machine()) for name in ("timm:test_vit", recipe.model))
    for part in ("train", "validation", "test"):
        pixels = []
        for data, mean, std in ((one, (0.5,) * 3, (0.5,) * 3), (other, image_files.MEAN, image_files.STD)):
            x, _ = next(getattr(data, part).batches(4, torch.Generator().manual_seed(0)))
            mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
            pixels.append((x * std + mean) * 255)
        torch.testing.assert_close(*pixels, rtol=0, atol=1e-3)


def test_imagenet_that_is_not_there_or_flat_is_said_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^ImageNet is missing \(no .*/imagenet/train\): unpack .*--data-dir .*$"):
        imagenet(tmp_path, 0)
    classes(tmp_path / "imagenet" / "train", a=60, b=40)
    with pytest.raises(ValueError, match=r"no .*/imagenet/val\): unpack"):
        imagenet(tmp_path, 0)
    write(tmp_path / "imagenet" / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ValueError, match="/imagenet/val has no class folders"):
        imagenet(tmp_path, 0)


@pytest.fixture
def pet_root(tmp_path) -> Path:
    """The official layout, with 3 breeds."""
    place = tmp_path / "oxford-iiit-pet"
    for part, count in (("trainval", 10), ("test", 2)):
        lines = []
        for label, breed in enumerate(("Abyssinian", "american_bulldog", "Bengal"), 1):
            for i in range(count):
                name = f"{breed}_{part}{i}"
                write(place / "images" / f"{name}.jpg")
                lines.append(f"{name} {label} 1 1\n")
        (place / "annotations").mkdir(exist_ok=True)
        (place / "annotations" / f"{part}.txt").write_text("".join(lines))
    return tmp_path


def test_pets(pet_root):
    data = pets(pet_root, 0, 8)
    assert (len(data.train), len(data.validation), len(data.test)) == (27, 3, 6)
    assert data.classes == 37
    assert data.train.training
    assert sorted(data.validation.labels.tolist()) == [0, 1, 2]
    assert not {*data.train.paths} & {*data.validation.paths}
    breeds = {0: "Abyssinian", 1: "american_bulldog", 2: "Bengal"}
    assert all(
        name.startswith(breeds[label]) for name, label in zip(names(data.test), data.test.labels.tolist(), strict=True)
    )
    assert next(data.train.batches(4, seeded()))[0].shape == (4, 3, 8, 8)


def test_the_seed_draws_the_validation_images_of_pets(pet_root):
    one, other = (pets(pet_root, seed, 8) for seed in (1, 2))
    assert set(one.validation.paths) != set(other.validation.paths)
    assert sorted([*one.train.paths, *one.validation.paths]) == sorted([*other.train.paths, *other.validation.paths])
    assert one.test.paths == other.test.paths


def test_pets_that_are_not_whole_are_said_in_one_line(pet_root):
    place = pet_root / "oxford-iiit-pet"
    (place / "images" / "Bengal_test0.jpg").unlink()
    line = (
        rf"1 of 36 images in {place} cannot be read: images/Bengal_test0\.jpg: delete {place} and put images\.tar\.gz"
    )
    with pytest.raises(ValueError, match=f"^{line}"):
        pets(pet_root, 0)
    (place / "annotations" / "test.txt").write_text("Bengal_test1 3")
    with pytest.raises(ValueError, match=r"^Oxford-IIIT Pet is incomplete: give --download, or put"):
        pets(pet_root, 0)
    shutil.rmtree(place / "images")  # only archives, or half of one
    (place / "images.tar.gz").write_bytes(b"half")
    with pytest.raises(
        ValueError, match=r"Oxford-IIIT Pet is incomplete: .* unpacked, into .*/oxford-iiit-pet \(or set"
    ):
        pets(pet_root, 0)
    with pytest.raises(ValueError, match=r"^Oxford-IIIT Pet is missing: give --download"):
        pets(pet_root / "elsewhere", 0)


@pytest.fixture
def flower_root(tmp_path, monkeypatch) -> Path:
    """The official layout, with 12 flowers of 3 classes."""
    place = tmp_path / "flowers-102"
    for i in range(1, 13):
        write(place / "jpg" / f"image_{i:05d}.jpg")
    savemat(place / "imagelabels.mat", {"labels": np.array([[1, 2, 102] * 4])})
    savemat(place / "setid.mat", {"trnid": [[1, 2, 3, 4]], "valid": [[5, 6, 7]], "tstid": [[8, 9, 10, 11, 12]]})
    files = {key: (name, None) for key, (name, _) in Flowers102._file_dict.items()}
    monkeypatch.setattr(Flowers102, "_file_dict", files)  # without the digests of the official ones
    return tmp_path


def test_flowers(flower_root):
    data = flowers(flower_root, 8)
    assert (len(data.train), len(data.validation), len(data.test)) == (4, 3, 5)
    assert data.classes == 102
    assert [s.training for s in (data.train, data.validation, data.test)] == [True, False, False]
    assert names(data.train.where(data.train.labels == 101)) == ["image_00003.jpg"]
    assert sorted(names(data.test)) == [f"image_{i:05d}.jpg" for i in range(8, 13)]


def test_flowers_that_are_not_whole_are_said_in_one_line(flower_root, monkeypatch):
    place = flower_root / "flowers-102"
    (place / "jpg" / "image_00007.jpg").unlink()
    with pytest.raises(
        ValueError, match=rf"1 of 12 .*: jpg/image_00007\.jpg: delete {place / 'jpg'} and put 102flowers"
    ):
        flowers(flower_root)
    monkeypatch.undo()  # now the digests are wrong
    with pytest.raises(ValueError, match=r"^Flowers-102 is incomplete: give --download, or put 102flowers\.tgz"):
        flowers(flower_root)


@pytest.mark.parametrize(("load", "kind"), [(flowers, Flowers102), (partial(pets, seed=0), OxfordIIITPet)])
def test_a_download_that_fails_says_what_to_do_by_hand(tmp_path, monkeypatch, load, kind):
    def fail(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(f"{kind.__module__}.download_and_extract_archive", fail)
    line = r"could not be downloaded \(.*Name or service not known.*\): put .*gz.* into .* yourself$"
    with pytest.raises(ValueError, match=line):
        load(tmp_path / "new", download=True)


def test_a_download_that_is_there_is_not_fetched_again(pet_root, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.oxford_iiit_pet.download_and_extract_archive", None)
    assert len(pets(pet_root, 0, 8, download=True).test) == 6


def test_real_flowers(data):
    root = data / "flowers102-128"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    whole = folder(root, 0, 64)
    assert (len(whole.train), len(whole.validation), len(whole.test)) == (459, 51, 510)
    assert whole.classes == 102
    assert set(whole.train.labels.tolist()) == set(range(102))
    x, _ = next(whole.train.batches(32, seeded()))
    assert x.shape == (32, 3, 64, 64)
    assert -0.7 < x.mean() < 0.3
    assert 0.7 < x.std() < 1.5
    assert [Path(whole.test.paths[i]).parent.name for i in range(3)] == [
        sorted(path.name for path in (root / "train").iterdir())[label] for label in whole.test.labels[:3].tolist()
    ]
