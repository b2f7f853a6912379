"""COCO annotation files: read, checked, and matched with images and classes."""

from __future__ import annotations

import json
import os
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["match_categories", "match_images", "read_annotations", "read_json"]

_BRIEF = reprlib.Repr()
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = 8
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 40
_BRIEF.maxlevel = 3

CATEGORY_RULES = ("auto", "name", "order", "label")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Args:
        path: the file.

    Returns:
        What it holds.

    Raises:
        OSError: it is missing.
        ValueError: it is not JSON; the message says where.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply: a COCO file has a few levels") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not JSON: it is not UTF-8 text") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise ValueError(f"{path} cannot be read: {error}") from None


def is_id(value: Any) -> bool:
    """Tell a whole number of 64 bits from everything else, ``True`` and ``False`` included."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def brief(value: Any) -> str:
    """Show a value of any form and size on one short line."""
    return _BRIEF.repr(value)


def read_annotations(path: str | Path) -> dict[str, Any]:
    """Read a COCO annotation file and check what everything else relies on.

    Args:
        path: a JSON object with ``images`` (``id``, ``file_name``) and ``categories`` (``id``, ``name``), and with
            ``annotations`` where it is a ground truth.

    Returns:
        The object, with ``annotations`` empty where there were none.

    Raises:
        OSError: it is missing.
        ValueError: it is not JSON or not of that form.
    """
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("images"), list):
        raise ValueError(f"{path} is not a COCO annotation file: it must be an object with a list of images")
    # Nothing else counts, and what is not kept cannot be odd.
    data = {name: data.get(name, []) for name in ("images", "annotations", "categories")}
    for name in ("images", "annotations", "categories"):
        rows = data[name]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} is not a COCO annotation file: {name} must be a list of objects")
        lacking = sum(not is_id(row.get("id")) for row in rows)
        # Annotations may be numbered afterwards; images and categories are referred to.
        if lacking and not (name == "annotations" and all("id" not in row for row in rows)):
            raise ValueError(f"{path}: {lacking} of {len(rows)} {name} have no whole number as id")
        twice = [key for key, count in Counter(row.get("id") for row in rows).items() if count > 1 and key is not None]
        if twice:
            raise ValueError(f"{path}: {len(twice)} ids stand more than once in {name}, the first is {twice[0]}")
    for rows, name in ((data["images"], "file_name"), (data["categories"], "name")):
        for row in rows:
            if name in row and not isinstance(row[name], (str, int)):
                raise ValueError(f"{path}: the {name} of id {row['id']} must be text; got {brief(row[name])}")
    return data


def match_images(images: Sequence[Mapping[str, Any]], names: Sequence[str], path: str | Path) -> dict[str, int]:
    """Find the id of each image file.

    Args:
        images: of an annotation file, with ``id`` and ``file_name``.
        names: relative paths of the files. A file whose path the annotations do not have goes by its last part where
            that is unique on both sides.
        path: the annotation file, for the message.

    Returns:
        The id of each name.

    Raises:
        ValueError: a file that the annotations do not know.

    Example:
        >>> match_images([{"id": 7, "file_name": "val/a.jpg"}, {"id": 9, "file_name": "b.jpg"}], ["a.jpg"], "gt.json")
        {'a.jpg': 7}
    """
    exact = {str(image["file_name"]): image["id"] for image in images if "file_name" in image}
    last = {os.path.basename(name): image_id for name, image_id in exact.items()}
    theirs = Counter(os.path.basename(name) for name in exact)
    ours = Counter(os.path.basename(name) for name in names)
    found: dict[str, int] = {}
    for name in names:
        base = os.path.basename(name)
        if name in exact:
            found.update({name: exact[name]})
        elif theirs[base] == ours[base] == 1:
            found.update({name: last[base]})
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{len(missing)} of {len(names)} images are not in {path}, the first is {missing[0]!r}")
    return found


def match_categories(
    class_names: Mapping[int, str], categories: Sequence[Mapping[str, Any]], rule: str = "auto"
) -> dict[int, int]:
    """Find the category id of each label.

    Args:
        class_names: the name of each label.
        categories: of an annotation file, with ``id`` and ``name``.
        rule: ``"name"``: the category of the same name, upper and lower case alike; ``"order"``: label 0 is the
            category with the lowest id, and so on; ``"label"``: the label is the id; ``"auto"``: by name where all
            labels or all categories find a partner, by order where the counts are equal and at least half of the names
            stand at the same place, as with the old and new names of COCO's classes.

    Returns:
        The category id of each label that has one.

    Raises:
        ValueError: an unknown rule, or classes and categories that ``"auto"`` cannot bring together.

    Example:
        >>> match_categories({0: "cat", 1: "dog"}, [{"id": 18, "name": "Dog"}, {"id": 17, "name": "Cat"}])
        {0: 17, 1: 18}
    """
    if rule not in CATEGORY_RULES:
        raise ValueError(f"unknown rule {rule!r} for categories: take one of {', '.join(CATEGORY_RULES)}")
    ids = {_plain(row.get("name", row["id"])): row["id"] for row in categories}
    in_order = sorted(row["id"] for row in categories)
    by_name = {label: ids[_plain(name)] for label, name in class_names.items() if _plain(name) in ids}
    by_order = {label: in_order[label] for label in sorted(class_names) if 0 <= label < len(in_order)}
    if rule == "label":
        return {category: category for category in in_order}
    if rule == "order":
        return by_order
    if rule == "name" or (by_name and len(by_name) in (len(class_names), len(ids))):
        return by_name
    agreeing = sum(by_order.get(label) == category for label, category in by_name.items())
    if len(class_names) == len(in_order) and agreeing == len(by_name) and 2 * agreeing >= len(in_order):
        return by_order
    raise ValueError(
        f"the model's {len(class_names)} classes and the {len(in_order)} categories of the annotations share "
        f"{len(by_name)} names: say with --categories whether they go by name, order or label"
    )


def _plain(name: Any) -> str:
    return str(name).strip().casefold()
