"""The provider that ``--provider`` names."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from quarot_onnx.errors import ConfigError


def provider_of(name: str | None, options: Sequence[str] | None) -> AbstractContextManager[None]:
    """Let all that runs inside run on a provider.

    Args:
        name: As it was typed; None for the default.
        options: ``KEY=VALUE`` each.

    Raises:
        ConfigError: There is no such provider here, or it is not named.
    """
    from quarot_onnx.sessions.providers import Provider, running_on  # noqa: PLC0415 - imports onnx_ir

    if name is None and options:
        raise ConfigError(f"--provider-option {options[0]}: name the provider that it is of with --provider")
    return running_on(None if name is None else Provider.of(name, options or ()))
