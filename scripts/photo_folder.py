"""An image folder of a few hundred photographs of many sizes, for trying fine-tuning.

    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb stamps
    python scripts/photo_folder.py stamps/usr/share/tuxpaint/stamps photos

The pictures are photographs among Tux Paint's stamps (birds, mammals, food, plants, household), cut out, with
transparency; drawings are left out. Seven of ten go to train/, the others to test/, chosen by their names.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from pathlib import Path

CLASSES = ("animals/birds", "animals/mammals", "food", "household", "plants")
DRAWN = ("cartoon", "dinosaur", "toys", "plastic", "mirror")
TRAIN_SHARE = 0.7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stamps", type=Path)
    parser.add_argument("root", type=Path, help="a folder that does not exist yet")
    arguments = parser.parse_args()
    if arguments.root.exists():
        parser.error(f"{arguments.root} exists")
    for name in CLASSES:
        found = [p for p in (arguments.stamps / name).rglob("*.png") if not any(w in str(p) for w in DRAWN)]
        # by a hash of the name: the same split everywhere, and no run of similar names on one side
        found.sort(key=lambda p: hashlib.sha256(p.name.encode()).hexdigest())
        cut = round(TRAIN_SHARE * len(found))
        for split, files in (("train", found[:cut]), ("test", found[cut:])):
            folder = arguments.root / split / Path(name).name
            folder.mkdir(parents=True)
            for file in files:
                shutil.copy(file, folder / "_".join(file.relative_to(arguments.stamps / name).parts))
        print(f"{name}: {cut} train, {len(found) - cut} test")


if __name__ == "__main__":
    main()
