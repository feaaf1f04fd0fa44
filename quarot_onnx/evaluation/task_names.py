"""Tasks by their names: which are meant, what they are loaded as, and where to look when lm-eval cannot.

lm-eval passes over files that it cannot read, and its errors name no file.
"""

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from traceback import walk_tb
from typing import Any

import yaml

from quarot_onnx.errors import CalibrationError, ConfigError, did_you_mean, first_and_more
from quarot_onnx.evaluation.spoken import Manner

_OWN = "a task of your own with local data can be named with --include-path DIR (docs/accuracy.md)"


class NamedTasks:
    """The tasks that are asked for.

    lm-eval's own tasks are some 15,000 files, which take half a minute to read; not where the folder has them all.

    Args:
        tasks: Names of tasks, groups or tags, or patterns.
        folder: Where YAML files of further tasks lie; None where there is no such folder.

    Raises:
        ConfigError: A name that is not known.
    """

    def __init__(self, tasks: Sequence[str], folder: str | Path | None) -> None:
        from lm_eval.tasks import TaskManager  # noqa: PLC0415 - late: seconds

        self._folder = None if folder is None else Path(folder)
        path = None if folder is None else str(folder)
        self.names: tuple[str, ...]
        if path is not None:
            self.manager = TaskManager(include_path=path, include_defaults=False)
            if set(tasks) <= set(self.manager.all_subtasks):
                self.names = tuple(dict.fromkeys(tasks))
                return
        self.manager = TaskManager(include_path=path)
        matched = {name: self.manager.match_tasks([name]) for name in tasks}
        for name, found in matched.items():
            if not found:
                raise ConfigError(self._unknown(name))
        self.names = tuple(dict.fromkeys(name for found in matched.values() for name in found))

    def _unknown(self, name: str) -> str:
        if self._folder is None:
            near, more = did_you_mean(name, self.manager.all_tasks), f"; {_OWN}"
        else:
            broken = list(_broken(self._folder, name))
            meant = any(path.stem == name for path in self._folder.glob("**/*.yaml"))
            near = "" if meant else did_you_mean(name, self.manager.all_tasks)
            more = f", and no file *.yaml in {self._folder} has it"
            if broken:
                more = f"; mend {first_and_more(broken)}, which cannot be read as a task"
        return f"lm-eval {version('lm_eval')} knows no task {name!r}{near}{more}"

    def loaded(self) -> list[Any]:
        """The tasks with their data; a group as one, a tag as its tasks.

        Raises:
            CalibrationError: Data cannot be had.
            ConfigError: A task wants text to be drawn, is named twice, or its YAML is not understood.
        """
        found = [task for name in self.names for task in self._loaded(name)]
        _refuse_twice(found)
        return found

    def _loaded(self, name: str) -> list[Any]:
        own = self._file(name)
        try:
            found = self.manager.load([name])
        except OSError as error:  # of datasets and what it fetches with: no connection, no such file, nothing kept
            way = f"or name data that are there in {own}" if own else f"or {_OWN}"
            raise CalibrationError(
                f"the data of the task {name!r} cannot be had ({line(error)}): fetch them once where there is a "
                f"connection and keep the cache, {way}"
            ) from error
        except StopIteration as error:
            raise CalibrationError(
                f"the data of the task {name!r} hold no item ({line(error)}): name others in {own}" if own else
                f"the data of the task {name!r} hold no item ({line(error)}): fetch them anew, or {_OWN}"
            ) from error  # fmt: skip
        except Exception as error:  # whatever a YAML file and the code that it names raise
            way = f"see {own}, and what its data hold" if own else _OWN
            raise ConfigError(f"lm-eval cannot set up the task {name!r} ({line(error)}); {way}") from error
        for task in found["tasks"].values():
            if task.OUTPUT_TYPE == "generate_until":
                Manner.of(task.get_config("generation_kwargs") or {})  # refused before any data are run
        groups = found.get("groups", {})
        return [groups[name]] if name in groups else list(found["tasks"].values())

    def _file(self, name: str) -> Path | None:
        """The file of a task or group in the user's folder; None where it is one of lm-eval's own, or a tag."""
        path: Path | None = self.manager.task_index[name].yaml_path
        return path if path and self._folder and path.is_relative_to(self._folder) else None

    def stopped(self, error: Exception, num_fewshot: int | None) -> ConfigError:
        """What to raise where lm-eval stops at the tasks.

        Args:
            error: What it raised.
            num_fewshot: Solved items before each one, where the user gave their number.
        """
        words = f"lm-eval stopped at {', '.join(self.names)} ({line(error)})"
        if any(frame.f_globals.get("__name__") == "lm_eval.api.samplers" for frame, _ in walk_tb(error.__traceback__)):
            said = "num_fewshot of the task" if num_fewshot is None else f"--num-fewshot {num_fewshot}"
            return ConfigError(f"{words}: there are too few items for {said}; give a lower --num-fewshot")
        files = [str(path) for path in map(self._file, self.names) if path]
        return ConfigError(f"{words}; see {first_and_more(files) if files else 'the YAML file of the task'}")


class _Loader(yaml.SafeLoader):
    """Reads a task's file without the functions that it names."""


_Loader.add_multi_constructor("!", lambda *_: None)


def _broken(folder: Path, name: str) -> Iterator[str]:
    """Files in a folder that lm-eval passed over, and why; first what may be that of a name."""
    for path in sorted(folder.glob("**/*.yaml"), key=lambda path: (path.stem != name, path)):
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            yield f"{path} ({f'line {mark.line + 1}, column {mark.column + 1}: ' if mark else ''}{error.problem})"
            continue
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            yield f"{path} ({line(error)})"
            continue
        if not isinstance(content, dict):
            yield f"{path} (it holds no keys)"
            continue
        included = content.get("include", [])
        for other in included if isinstance(included, list) else [included]:
            if not (path.parent / str(other)).is_file():
                yield f"{path} (it includes {other}, which is not there)"
        if path.stem == name and not {"task", "group", "include"} & content.keys():  # others are there to be included
            yield f"{path} (it has neither the key task nor the key group)"


def _refuse_twice(loaded: Sequence[Any]) -> None:
    """Refuse a task that is named alone and in a group, or in two groups; its figures would stand there once."""
    seen: dict[str, str] = {}
    for item in loaded:
        group = hasattr(item, "get_all_tasks")
        source = f"in the group {item.name!r}" if group else "by its name"
        for task in item.get_all_tasks() if group else [item]:
            first = seen.setdefault(task.task_name, source)
            if first != source:
                raise ConfigError(
                    f"the task {task.task_name!r} is asked for twice in --tasks, {first} and {source}: name "
                    "one of them (a pattern may mean both)"
                )


def line(error: Exception) -> str:
    """An error of another package in a line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
