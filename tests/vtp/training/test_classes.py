"""Which label a class has: the order of folders and of class maps, and what a model's own names do to it."""

import dataclasses
import unicodedata

import pytest
import torchvision
from torch.utils.data import Subset

from tests.support.folders import knows, write_classes
from vtp.model.images import class_names, new_head, set_image_config
from vtp.pipeline import fit_data
from vtp.training.classes import difference, in_short, read_class_map
from vtp.training.data import Data, DataError, FileImages, match_classes, open_data
from vtp.training.evaluation import evaluate

NUMBERS = {str(number): number for number in range(12)}
PETS = {"ape": 3, "cat": 4, "dog": 5}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """Class folders 0 to 11."""
    return write_classes(tmp_path_factory.mktemp("numbers"), NUMBERS)


def named(folder, names, **options) -> tuple[Data, object]:
    """Data of a folder, and a model that knows the images, with its outputs in the order of `names`."""
    file = folder / "order.txt"
    file.write_text("\n".join(names) + "\n")
    data = open_data(folder, class_map=file)
    file.unlink()
    model = knows(data)
    set_image_config(model, label_names=tuple(names))
    return open_data(folder, **options), model


def top1(data: Data, model, **options) -> float:
    return evaluate(model, fit_data(data, model, **options))[0]


def test_fresh_folders_have_the_labels_that_torchvision_gives_them(numbers):
    data = open_data(numbers)
    expected = torchvision.datasets.ImageFolder(numbers / "train")
    assert list(data.class_names) == expected.classes == sorted(NUMBERS)
    found = {images.filename(i): images[i][1] for images in [data.train] for i in range(len(images))}
    assert found == dict(expected.samples)
    model = knows(data)
    new_head(model, 12)
    (note,) = match_classes(data, class_names(model), is_new=True).notes
    assert "sorts them: 0, 1, 10, 11, ..." in note and "sort by value: 0, 1, 2, 3, ..." in note
    assert "--class-map" in note


def test_model_of_another_order_is_evaluated_by_name_and_that_is_said(numbers):
    data, model = named(numbers, NUMBERS)  # 0, 1, 2, ...
    fitted = fit_data(data, model)
    assert evaluate(model, fitted)[0] == 100
    assert fitted.train.labels.tolist() == [
        int(fitted.train.filename(i).split("/")[-2]) for i in range(len(fitted.train))
    ]
    (note,) = fitted.notes
    assert "in another order than the model's, and are mapped by name" in note
    assert "0, 1, 10, 11, 2" in note and "the model has 0, 1, 2, 3" in note
    assert class_names(model) == fitted.class_names == tuple(NUMBERS)
    silent, same = named(numbers, sorted(NUMBERS))
    assert fit_data(silent, same).notes == ()


def test_any_kind_of_set_is_mapped_by_name():
    data = open_data()
    backwards = data.class_names[::-1]
    few = dataclasses.replace(data, train=Subset(data.train, range(50)))
    fitted = match_classes(few, backwards)
    assert [9 - fitted.train[i][1] for i in range(50)] == data.train.labels[:50].tolist()
    assert (9 - fitted.test.labels).tolist() == data.test.labels.tolist()


def test_class_folder_that_was_renamed_is_refused_with_both_lists_or_mapped(tmp_path):
    data, model = named(write_classes(tmp_path / "then", PETS), PETS)
    assert top1(data, model) == 100
    renamed = write_classes(tmp_path / "now", {"ape": 3, "kitten": 4, "dog": 5})
    expected = (
        "other classes than the model: the data have ape, dog, kitten; the model has ape, cat, dog.*class"
    )
    with pytest.raises(DataError, match=expected):
        fit_data(open_data(renamed), model)
    (tmp_path / "map.txt").write_text("ape\nkitten\ndog\n")
    fitted = fit_data(open_data(renamed, class_map=tmp_path / "map.txt"), model)
    assert evaluate(model, fitted)[0] == 100
    assert "ape, cat, dog are, by the class map, the data's ape, kitten, dog" in fitted.notes[0]
    assert class_names(model) == ("ape", "cat", "dog")


@pytest.mark.parametrize("way", ["names", "class map", "both"])
def test_some_of_the_classes_are_enough_to_evaluate_among_them(numbers, tmp_path, way):
    _, model = named(numbers, sorted(NUMBERS))
    model.head.bias.data[sorted(NUMBERS).index("3")] = 1e3  # the answer to everything, were it allowed
    few = write_classes(tmp_path, {name: NUMBERS[name] for name in ("11", "2", "7")}, splits=("val",))
    options = {}
    if way != "names":
        (tmp_path / "map.txt").write_text("\n".join(sorted(NUMBERS)))
        options = {"class_map": tmp_path / "map.txt"}
    if way == "class map":
        set_image_config(model, label_names=None)
    data = open_data(few, train=False, **options)
    fitted = fit_data(data, model, subset=True)
    assert evaluate(model, fitted)[0] == 100
    assert fitted.labels_present == (3, 4, 9)
    if way == "names":
        assert "has 3 of the model's 12 classes: predictions are made among these" in fitted.notes[0]
        with pytest.raises(DataError, match=r"training on them would unlearn the others.*--new-head"):
            fit_data(data, model)


def test_model_that_does_not_name_its_classes_takes_the_datas_and_says_so(numbers):
    data = open_data(numbers)
    model = knows(data)
    (note,) = fit_data(data, model).notes
    assert "order of the model's classes is not known" in note and "earlier versions of vtp sort by" in note
    assert class_names(model) == data.class_names
    pets = knows(dataclasses.replace(data, num_classes=12))
    set_image_config(pets, label_names=("cat", "dog"))
    assert class_names(pets) is None, "names of another head"


def test_new_head_takes_the_names_of_the_data(tmp_path):
    data, model = named(write_classes(tmp_path, PETS), ["dog", "cat", "ape"])
    new_head(model, 3)
    assert fit_data(data, model).notes == ()
    assert class_names(model) == tuple(PETS)


def test_names_are_equal_however_their_accents_are_written(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "éléphant") for form in ("NFC", "NFD"))
    data, model = named(write_classes(tmp_path, {decomposed: 1, "zebra": 2}), [decomposed, "zebra"])
    set_image_config(model, label_names=(composed, "zebra"))
    assert top1(data, model) == 100


def test_data_that_do_not_name_their_classes_say_so():
    data = dataclasses.replace(open_data(), class_names=())
    assert "does not name its classes" in match_classes(data, tuple("abcdefghij")).notes[0]
    assert match_classes(data, None) is data


def test_imagenets_classes_are_known_by_synset_and_in_words():
    synsets, words = ("n02012849", "n02123045", "n03126707"), ("crane", "tabby, tabby cat", "crane")
    data = dataclasses.replace(
        open_data(), class_names=("crane", "tabby, tabby cat", "crane2"), num_classes=3
    )
    matched = match_classes(data, synsets, descriptions=words)
    assert matched.class_names == synsets and matched.notes == ()
    with pytest.raises(DataError, match="other classes"):
        match_classes(data, synsets, descriptions=("crane", "tiger", "crane"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("map.pkl", "", r"expected a \.txt file"),
        ("map.txt", None, "no file"),
        ("map.txt", "", "one name a line"),
        ("map.txt", "a\nb\na\n", "a name twice"),
        ("map.txt", "a\n\nb\n", "an empty line"),
        ("map.txt", "x\ny\n", "no image in any class folder of the class map"),
    ],
)
def test_class_map_that_is_none_is_refused(numbers, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        open_data(numbers, class_map=tmp_path / name)


def test_class_map_orders_every_kind_of_data_and_leaves_out_folders_it_does_not_name(numbers, tmp_path):
    file = tmp_path / "map.txt"
    file.write_text("10\n9\n\n")
    data = open_data(numbers, class_map=file)
    assert (data.class_names, data.num_classes, len(data.train)) == (("10", "9"), 2, 4)
    assert isinstance(data.train, FileImages) and data.train.labels.tolist() == [0, 0, 1, 1]
    assert "not in the class map, and left out: 10 class folders: 0, 1, 11" in data.notes[0]
    embedded = open_data()
    file.write_text("\n".join(embedded.class_names[::-1]))
    again = open_data(class_map=file)
    assert (9 - again.test.labels).tolist() == embedded.test.labels.tolist()
    file.write_text("Coat\nBag\n")
    with pytest.raises(
        DataError, match="class_map: expected every class of fashion-mnist-10k: the data have"
    ):
        open_data(class_map=file)
    assert read_class_map(file) == ("Coat", "Bag")


def test_long_lists_are_shortened_to_what_differs():
    names = [f"n{number}" for number in range(1000)]
    text = difference([*names[:-1], "x"], names)
    assert text == "only the data have x; only the model has n999; 999 are in both"
    assert in_short(names, 2) == "n0, n1, ... (1000 in all)"
