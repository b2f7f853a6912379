"""Print the oldest versions that pyproject.toml admits, as pins for pip: `make test-oldest` installs them.

    python scripts/oldest_versions.py > oldest.txt && pip install -c oldest.txt -e '.[all,dev]'

Each floor (`name>=1.2`) becomes a pin (`name==1.2`), so a floor that is written is a floor that is tested.
"""

import re
import sys
import tomllib
from pathlib import Path

REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(>=|==)\s*([A-Za-z0-9.]+)(?:\s*,.*)?")


def oldest(project: dict, extras: tuple[str, ...]) -> dict[str, str]:
    """Read the floors of the core and of some extras; an extra that names others of this project brings theirs.

    Args:
        project: the table ``project`` of pyproject.toml.
        extras: names of its extras.

    Returns:
        The floor of each distribution; where it is stated twice, the higher.
    """
    waiting = [*project["dependencies"]]
    seen = list(extras)
    waiting += [line for extra in extras for line in project["optional-dependencies"][extra]]
    floors: dict[str, str] = {}
    while waiting:
        requirement = waiting.pop()
        if own := re.fullmatch(rf"{project['name']}\[([^\]]+)\]", requirement):
            inner = [extra.strip() for extra in own[1].split(",") if extra.strip() not in seen]
            seen += inner
            waiting += [line for extra in inner for line in project["optional-dependencies"][extra]]
            continue
        found = REQUIREMENT.fullmatch(requirement)
        if found is None:
            raise ValueError(f"expected NAME>=FLOOR or NAME==VERSION in pyproject.toml, got {requirement!r}")
        name, _, floor = found.groups()
        floors[name] = max(floor, floors.get(name, floor), key=_as_numbers)
    return floors


def _as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for name, floor in sorted(oldest(project, tuple(sys.argv[1:]) or ("all", "dev")).items()):
        print(f"{name}=={floor}")


if __name__ == "__main__":
    main()
