"""Every kind of data, from small files of the exact published structure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captionfix.errors import DataError
from captionfix.evaluate import data, published
from captionfix.evaluate.boxes import Mentions


@pytest.fixture
def line(tmp_path: Path) -> dict:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "a.png")
    words = ["A", "black", "dog", ",", "running", "on", "the", "Grass", "."]
    phrases = [
        {"span": [0, 3], "entity": 1, "types": ["animals"], "boxes": [[0, 0, 0.5, 0.5]]},
        {"span": [6, 8], "entity": 2, "types": ["scene"]},
        {"span": [4, 5], "entity": 0, "types": ["notvisual"], "boxes": [[0, 0, 1, 1]]},
    ]
    other = {
        "words": ["two", "dogs"],
        "phrases": [{"span": [0, 2], "entity": 1, "types": ["animals"], "boxes": [[0, 0, 0.5, 0.5], [0.5, 0, 1, 1]]}],
    }
    return {"photo": "a.png", "width": 8, "height": 8, "captions": [{"words": words, "phrases": phrases}, other]}


def test_lines_format(tmp_path, line):
    (tmp_path / "dev.jsonl").write_text(json.dumps(line) + "\n")
    (item,) = data.lines(tmp_path / "dev.jsonl")
    assert item.words == ("a", "black", "dog", "running", "on", "the", "grass")
    assert [(p.words, p.kind) for p in item.phrases] == [((1, 2), "animals")]
    assert item.image.size == (8, 8)
    assert [r.words for r in item.references] == [item.words, ("two", "dogs")]
    assert item.references[0].mentions == Mentions(
        (("dog", ((0, 0, 0.5, 0.5),)),), frozenset({"black", "run", "grass"})
    )
    assert item.references[1].phrases[0].all_boxes == ((0, 0, 0.5, 0.5), (0.5, 0, 1, 1))


def test_damaged_lines_are_named(tmp_path):
    (tmp_path / "dev.jsonl").write_text('{"photo": "a.png"}\n')
    with pytest.raises(DataError, match="line 1"):
        list(data.lines(tmp_path / "dev.jsonl"))
    (tmp_path / "empty.jsonl").write_text('{"photo": "a.png", "captions": []}\n')
    with pytest.raises(DataError, match=r"line 1.*no captions"):
        list(data.lines(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="no such file"):
        list(data.lines(tmp_path / "none.jsonl"))


SENTENCES = """\
[/EN#11/people A tall man] throws [/EN#12/other a ball] to [/EN#13/animals/other his dogs] in [/EN#14/scene the park] .
[/EN#0/notvisual It] is [/EN#15/other a day] with [/EN#16/other some sky] , [/EN#13/animals the dogs] 're running .
"""
XML = """\
<annotation>
 <filename>77.jpg</filename>
 <size><width>100</width><height>50</height><depth>3</depth></size>
 <object><name>11</name><bndbox><xmin>1</xmin><ymin>6</ymin><xmax>51</xmax><ymax>50</ymax></bndbox></object>
 <object><name>13</name><name>12</name>
  <bndbox><xmin>61</xmin><ymin>1</ymin><xmax>71</xmax><ymax>11</ymax></bndbox></object>
 <object><name>13</name><bndbox><xmin>81</xmin><ymin>1</ymin><xmax>91</xmax><ymax>11</ymax></bndbox></object>
 <object><name>14</name><scene>1</scene><nobndbox>0</nobndbox></object>
 <object><name>15</name><scene>0</scene><nobndbox>1</nobndbox></object>
 <object><name>16</name><scene>1</scene><nobndbox>0</nobndbox></object>
 <object><name>16</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>100</xmax><ymax>9</ymax></bndbox></object>
</annotation>
"""


@pytest.fixture
def entities(tmp_path: Path) -> Path:
    for folder, name, text in (("Sentences", "77.txt", SENTENCES), ("Annotations", "77.xml", XML)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    (tmp_path / "test.txt").write_text("77\n")
    (tmp_path / "flickr30k-images").mkdir()
    Image.new("RGB", (100, 50)).save(tmp_path / "flickr30k-images" / "77.jpg")
    return tmp_path


def test_flickr30k_entities(entities):
    (item,) = published.entities(entities, split="test")
    assert item.name == "77"
    assert item.image.size == (100, 50)
    assert " ".join(item.words) == "a tall man throws a ball to his dogs in the park"
    dogs = ((0.6, 0.0, 0.7, 0.2), (0.8, 0.0, 0.9, 0.2))
    assert (
        [(p.words, p.kind, p.boxes) for p in item.phrases]
        == [
            ((1, 2), "people", ((0.0, 0.1, 0.5, 0.98),)),  # counted from 0, in fractions of 100 x 50
            ((5,), "other", dogs[:1]),
            ((8,), "animals", dogs),  # both boxes of the chain, one of them shared with the ball
        ]
    )  # no park (a scene), no day (no box), no sky (a scene that has a box all the same), nothing that is not visual
    second = item.references[1]
    assert " ".join(second.words) == "it is a day with some sky the dogs 're running"
    assert [(p.words, p.boxes) for p in second.phrases] == [((8,), dogs)]


def test_flickr30k_entities_that_are_not_whole(entities):
    with pytest.raises(DataError, match=r"val\.txt: there is no such list"):
        list(published.entities(entities, split="val"))
    with pytest.raises(DataError, match="no photographs"):
        list(published.entities(entities, images=entities / "nowhere"))
    (entities / "Annotations" / "77.xml").write_text("<annotation>")
    with pytest.raises(DataError, match="photograph 77"):
        list(published.entities(entities))


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    folder = tmp_path / "annotations"
    folder.mkdir()
    images = [
        {"id": 9, "file_name": "009.png", "width": 10, "height": 8},
        {"id": 3, "file_name": "003.png", "width": 4, "height": 4},
    ]
    captions = [
        {"id": 1, "image_id": 9, "caption": "Two men eat hot dogs at a dining table, a fire hydrant beside them."},
        {"id": 2, "image_id": 9, "caption": "A woman with a zebra."},
        {"id": 3, "image_id": 3, "caption": "Nothing here."},
    ]
    square = {"segmentation": [[0, 0, 5, 0, 5, 4, 0, 4]], "iscrowd": 0, "area": 20, "bbox": [0, 0, 5, 4]}
    crowd = {"segmentation": {"size": [8, 10], "counts": [72, 8]}, "iscrowd": 1, "area": 8, "bbox": [9, 0, 1, 8]}
    instances = [
        {"id": 1, "image_id": 9, "category_id": 1, **square},
        {"id": 2, "image_id": 9, "category_id": 1, **crowd},
        {"id": 3, "image_id": 9, "category_id": 58, **square},
        {"id": 4, "image_id": 9, "category_id": 18, **square},
    ]
    names = {1: "person", 18: "dog", 58: "hot dog", 67: "dining table", 24: "zebra", 11: "fire hydrant"}
    categories = [{"id": key, "name": name, "supercategory": f"super {name}"} for key, name in names.items()]
    base = {"info": {}, "licenses": [], "images": images}
    (folder / "captions_val2017.json").write_text(json.dumps({**base, "annotations": captions}))
    (folder / "instances_val2017.json").write_text(
        json.dumps({**base, "annotations": instances, "categories": categories})
    )
    (tmp_path / "val2017").mkdir()
    for image in images:
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / "val2017" / image["file_name"])
    return tmp_path


def test_coco(coco, capsys):
    pytest.importorskip("pycocotools")
    first, second = published.coco(coco)
    assert (first.name, first.phrases) == ("003.png", ())
    assert [(second.words[p.words[0]], p.words, p.kind) for p in second.phrases] == [
        ("men", (1,), "super person"),
        ("hot", (3, 4), "super hot dog"),  # and no dog
    ]  # neither a table nor a hydrant was annotated
    expected = np.zeros((8, 10), dtype=bool)
    expected[:4, :5] = True
    np.testing.assert_array_equal(second.phrases[1].mask, expected)
    expected[:, 9] = True  # the crowd belongs to the people
    np.testing.assert_array_equal(second.phrases[0].mask, expected)
    assert [p.words for p in second.references[1].phrases] == [(1,)]
    assert second.image.size == (10, 8)
    assert capsys.readouterr().out == ""  # pycocotools prints


def test_coco_that_is_not_whole(coco):
    pytest.importorskip("pycocotools")
    with pytest.raises(DataError, match=r"captions_train2017\.json: there is no such file"):
        list(published.coco(coco, "train2017"))
    (coco / "annotations" / "instances_val2017.json").write_text("[]")
    with pytest.raises(DataError, match="COCO's layout"):
        list(published.coco(coco))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a bike and a motorbike", ["bicycle", "motorcycle"]),
        ("children near people", ["person", "person"]),
        ("teddy bears", ["teddy bear"]),
        ("a bear", ["bear"]),
        ("the dog's balls", ["sports ball"]),
        ("tables", ["dining table"]),
        ("a cat on its own", []),
    ],
)
def test_words_are_matched_to_categories(text, found):
    names = dict(enumerate(["person", "bicycle", "motorcycle", "bear", "teddy bear", "sports ball", "dining table"]))
    table = published.category_table(names)
    assert [names[key] for _, key in published.categories(text.split(), table)] == found


def test_what_a_path_holds_is_found(tmp_path, line, entities, coco):
    (tmp_path / "dev.jsonl").write_text(json.dumps(line) + "\n")
    lines = tmp_path / "only lines"
    (lines / "images").mkdir(parents=True)
    (lines / "dev.jsonl").write_text(json.dumps(line) + "\n")
    assert next(published.open_data(str(lines))()).name == "a.png"
    assert next(published.open_data(str(tmp_path / "dev.jsonl"))()).name == "a.png"
    assert next(published.open_data("scenes", limit=1, first=3, split="held-out")()).name == "scene held-out 3"
    read = published.open_data(str(entities), split="test")
    assert [item.name for item in read()] == [item.name for item in read()] == ["77"]
    for name, says in (("nowhere", "no such file"), (str(tmp_path / "images"), "holds neither dev.jsonl")):
        with pytest.raises(DataError, match=says):
            published.open_data(name)
    with pytest.raises(DataError, match="no split 'val'"):
        published.open_data("scenes", split="val")


class Says:
    """A captioner that always says the same."""

    def __init__(self, real, caption):
        self.vocabulary, self.device, self.prepare = real.vocabulary, real.device, real.prepare
        self.ids = real.tokenize(caption)

    def generate(self, pixels, beams):
        return [self.ids]


def test_generated_captions_are_scored_where_a_reference_supports_them(captioner, tmp_path, line):
    (tmp_path / "dev.jsonl").write_text(json.dumps(line) + "\n")
    (item,) = data.lines(tmp_path / "dev.jsonl")
    said = data.generated(Says(captioner, "a red dog runs black"), item)
    assert said.words == ("a", "red", "dog", "runs", "black")
    # "dog" is in both references: all boxes of either; "runs" is in none of their regions, "red" in no reference
    assert [(p.words, p.boxes) for p in said.phrases] == [
        ((2,), ((0, 0, 0.5, 0.5), (0.5, 0, 1, 1))),
        ((4,), ((0, 0, 0.5, 0.5),)),
    ]
    assert said.references == item.references


def test_stems_join_plurals():
    assert data.stem("dogs") == data.stem("dog")
    assert data.stem("women") == data.stem("woman")
    assert data.stem("people") == data.stem("person")
    assert data.stem("man") != data.stem("woman")
