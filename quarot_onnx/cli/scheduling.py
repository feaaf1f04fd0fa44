"""The scheduler that ``--scheduler`` names."""

import logging


def quiet_scheduler(address: str | None) -> str | None:
    """The address as it was typed; what goes wrong with it is told in one line of ours, so Dask need not."""
    if address is not None:
        logging.getLogger("distributed").setLevel(logging.CRITICAL)
    return address
