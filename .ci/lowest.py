"""Print a constraints file with the lowest version of each dependency in pyproject.toml."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for requirement in project["dependencies"] + project["optional-dependencies"]["redis"]:
    found = re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?>=([0-9.]+)", requirement)
    if found is None:
        raise SystemExit(f"no lower bound in {requirement!r}")
    print(f"{found[1]}=={found[2]}")
