# SPDX-License-Identifier: Apache-2.0
"""``opd new``: a published recipe under a name of one's own, as a folder with everything that one may want to edit.

The folder holds the scripts and, in ``config``, the settings behind them: the method, what a scale needs of it, and
the recipes; of a pipeline, whose stages are code, the recipes. Its scripts read these settings, and their run folders
bear its name, so that the copy never trains into the run folders of the original.
"""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from opd_ext.errors import ConfigError
from opd_ext.files import write_whole

PACKAGE = Path(__file__).parent
SCALES = ("cpu_tiny", "node_8xh200")
PIPELINES = ("ssd", "t3s")
PLANNED = "tiny_cpu.sh"  # whose plan is printed: it runs anywhere


def recipes() -> Path:
    """The folder of the published recipes: within the installed package, or beside it in a checkout.

    Raises:
        ConfigError: if there is neither.
    """
    for folder in (PACKAGE / "recipes", PACKAGE.parent / "recipes"):
        if (folder / "common.sh").is_file():
            return folder
    raise ConfigError(f"There are no recipes in or beside {PACKAGE}; install opd-ext again.")


def sources() -> list[str]:
    """The methods that have both a preset and a folder of recipes, and the pipelines."""
    presets = {path.stem for path in (PACKAGE / "config" / "method").glob("*.yaml")} | set(PIPELINES)
    return sorted(folder.name for folder in recipes().iterdir() if folder.name in presets)


def copy_recipe(name: str, source: str, out: Path, force: bool = False) -> Path:
    """Write the folder ``out/name`` from the recipes of ``source``, and return it.

    Args:
        name: of the new method, folder, experiments and run folders.
        force: write into a folder that exists; files of other names stay.

    Raises:
        ConfigError: for a name that cannot be one, a source that does not exist, or a folder that does.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        raise ConfigError(f"{name} cannot be a name: take a letter, then letters, digits, _ and -.")
    if name in PIPELINES or (PACKAGE / "config" / "method" / f"{name}.yaml").is_file():
        raise ConfigError(f"{name} is a published method; give the copy a name of its own.")
    if source not in sources():
        raise ConfigError(f"--from {source} does not exist; choose one of: {', '.join(sources())}.")
    folder = out / name
    if folder.exists() and not force:
        raise ConfigError(f"{folder} exists; choose another name or --out, or write into it with --force.")
    for path, text in _files(name, source).items():
        target = folder / path
        write_whole(target, text)
        if target.suffix == ".sh" and target.name != "common.sh":
            target.chmod(0o755)
    return folder


def _files(name: str, source: str) -> dict[str, str]:
    """Path within the new folder -> text."""
    scripts = _scripts(name, source)
    settings = _pipeline_settings(name, source) if source in PIPELINES else _method_settings(name, source)
    files = {
        "README.md": _readme(name, source, scripts, settings),
        "common.sh": (recipes() / "common.sh").read_text(),
    }
    return files | scripts | settings


def _pipeline_settings(name: str, source: str) -> dict[str, str]:
    """Its recipes; what the miniature world needs of it becomes one of them, which sets the run folder as they do."""
    config = PACKAGE / "config" / "pipelines"
    texts = {path.name: path.read_text() for path in sorted((config / "recipe" / source).glob("*.yaml"))}
    run_dir = f"\nrun_dir: ${{oc.env:OPD_RUNS,runs}}/{source}-cpu_tiny\n"
    texts["tiny_cpu.yaml"] = (config / "tuning" / f"{source}_cpu_tiny.yaml").read_text() + run_dir
    changes = {rf"^  - {source}/": f"  - {name}/", rf"\}}/{source}-": f"}}/{name}-"}
    return {f"config/recipe/{name}/{file}": _replaced(text, changes) for file, text in texts.items()}


def _method_settings(name: str, source: str) -> dict[str, str]:
    config = PACKAGE / "config"
    files = {f"config/method/{name}.yaml": _method(name, source, (config / "method" / f"{source}.yaml").read_text())}
    for scale in SCALES:
        if (tuning := config / "tuning" / f"{source}_{scale}.yaml").is_file():
            files[f"config/tuning/{name}_{scale}.yaml"] = tuning.read_text()
    for recipe in sorted((config / "recipe" / source).glob("*.yaml")):
        files[f"config/recipe/{name}/{recipe.name}"] = _recipe(name, source, recipe.read_text())
    return files


def _method(name: str, source: str, text: str) -> str:
    package, rest = text.split("\n", 1)
    rest = _replaced(rest, {rf"^  method: {source}$": f"  method: {name}"})
    return f"{package}\n# Began as a copy of {source}, whose description follows.\n{rest}"


def _recipe(name: str, source: str, text: str) -> str:
    return _replaced(
        text,
        {
            rf"^  - override /method: {source}$": f"  - override /method: {name}",
            rf"^  - {source}/": f"  - {name}/",
        },
    )


def _scripts(name: str, source: str) -> dict[str, str]:
    paths = sorted((recipes() / source).glob("*.sh"))
    script = _pipeline_script if source in PIPELINES else _script
    return {path.name: script(name, source, path.read_text()) for path in paths}


def _pipeline_script(name: str, source: str, text: str) -> str:
    return _replaced(
        text,
        {
            f"^exec opd {source} ": f'exec opd {source} --config-dir "$here/config" ',
            rf'\b(recipe="?|name_pipeline ){source}/(?!tiny_diffusion)': rf"\g<1>{name}/",
            r'(config" )scale=cpu_tiny "': rf'\g<1>recipe={name}/tiny_cpu "',
            rf"opd_ext/config/pipelines/recipe/{source}/": f"config/recipe/{name}/",
            rf"\brecipes/{source}/": f"{name}/",
            rf"(runs\}}?)/{source}-": rf"\g<1>/{name}-",
        },
    )


def _script(name: str, source: str, text: str) -> str:
    return _replaced(
        text,
        {
            "^exec opd train ": 'exec opd train --config-dir "$here/config" ',
            rf"\b(recipe=|gpu_run |name_run ){source}/": rf"\g<1>{name}/",
            rf"\bmethod={source}(?= )": f"method={name}",
            rf"opd_ext/config/recipe/{source}/": f"config/recipe/{name}/",
            rf"(?<!/)\bmethod/{source}\.yaml": f"config/method/{name}.yaml",
            rf"\brecipes/{source}/": f"{name}/",
            rf"\}}/{source}-": f"}}/{name}-",
        },
    )


def _replaced(text: str, changes: dict) -> str:
    for pattern, new in changes.items():
        text = re.sub(pattern, new, text, flags=re.MULTILINE)
    return text


def choices(script: str) -> list[str]:
    """What the text of a script of the new folder chooses in the last line: method and scale, or a recipe."""
    (chosen,) = re.findall(r'^exec opd \w+ --config-dir "\$here/config" (.*) "\$\{inputs', script, re.MULTILINE)
    return chosen.replace('"', "").split()


def _readme(name: str, source: str, scripts: dict[str, str], settings: dict[str, str]) -> str:
    command = source if source in PIPELINES else "train"
    commands = "\n".join(
        f"| `{name}/{script}` | `opd {command} --config-dir {name}/config {' '.join(choices(text))}` |"
        for script, text in scripts.items()
    )
    kinds = {
        f"config/method/{name}.yaml": "the algorithm: the five places, sampling, lengths, optimiser",
        f"config/recipe/{name}/*.yaml": "what belongs to a model and its data",
        f"config/tuning/{name}_*.yaml": "what a scale needs of it: the miniature world's learning rate and batch",
    }
    there = {str(Path(file).parent) for file in settings}
    kept = "\n".join(f"| `{file}` | {what} |" for file, what in kinds.items() if str(Path(file).parent) in there)
    return f"""# {name}

Began as a copy of {source}, made by `opd new {name} --from {source}`. What {source} is, what it reaches and where it
fails stands in the recipe's own guide: `{source}/README.md` in the folder that `opd new --recipes` prints.

| file | what to edit there |
|---|---|
{kept}

| script | what it runs, with inputs from the environment (see its first lines) |
|---|---|
{commands}

Every script takes `--dry-run`, and overrides behind its name. Run folders are `${{OPD_RUNS:-runs}}/{name}-...`; a
folder that is copied or renamed gets run folders of its own. In a Ray job, this folder must lie within the checkout
that is submitted.
"""


def main(name: str, source: str, out: Path, force: bool) -> None:
    """Copy, check what every script of the copy would run, print the plan of one, and say where their runs will be.

    Raises:
        ConfigError: of :func:`copy_recipe`, or from planning.
    """
    folder = copy_recipe(name, source, out, force)
    runs = (_planned_pipeline if source in PIPELINES else _planned)(folder, name, source)
    print(f"{folder} is a copy of {source}: edit what its README.md names. Started from here,")
    for script, run_dir in runs.items():
        print(f"    {folder / script} trains into {run_dir}")


def _planned_pipeline(folder: Path, name: str, source: str) -> dict[str, str]:
    """Recipe -> its run folder."""
    from opd_ext.pipelines import command

    found = {}
    for file in sorted((folder / "config" / "recipe" / name).glob("*.yaml")):
        config = command.compose(source, [f"recipe={name}/{file.stem}"], [folder / "config"])
        found[str(file.relative_to(folder))] = config.run_dir
    return found


def _planned(folder: Path, name: str, source: str) -> dict[str, str]:
    """Script -> its run folder; prints the plan of one."""
    from opd_ext import train
    from opd_ext.plan import print_plan

    runs = {}
    for script in sorted(_scripts(name, source), key=lambda script: script == PLANNED):
        config = train.compose_config(choices((folder / script).read_text()), [folder / "config"])
        opd = train.checked(config)
        train.prepare_environment(config, opd)
        with redirect_stdout(StringIO()):  # verl says of each that it is fine
            train.validate(config)
        runs[script] = opd.run_dir
    print_plan(config, opd)
    return runs
