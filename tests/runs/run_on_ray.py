"""One run on Ray in a process of its own, for test_ray to kill: python run_on_ray.py GIVEN OUT BATCH ACTORS ADDRESS."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[2]))
    from detpost.runs.ray import detect
    from tests.runs.raw_outputs import Maker

    given, out, batch, actors, address = sys.argv[1:]
    summary = detect(
        [Path(given) / "images"],
        out,
        model=Maker(Path(given)),
        batch_size=int(batch),
        actors=int(actors),
        address=address,
    )
    print(summary.images, summary.finished, summary.resumed)
