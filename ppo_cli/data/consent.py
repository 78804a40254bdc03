"""A reward's code runs only if the user of the command names it, and so for servers."""

from __future__ import annotations

import shlex
from collections.abc import Collection

from ppo_cli.config.reward import RewardConfig
from ppo_cli.data.fingerprint import Inputs
from ppo_cli.errors import ConsentError


def check_consent(
    config: RewardConfig, consented: Collection[str], run: str, inputs: Inputs | None = None
) -> None:
    """Raise `ConsentError` where the reward uses code or a server that nobody has consented to.

    Args:
        config: the section `reward`.
        consented: functions and endpoints, as `config` names them.
        run: the run directory that names them, for the message.
        inputs: its records, which know where the functions were.
    """
    missing = [spec for spec in config.foreign if spec not in consented]
    if missing:
        places = {} if inputs is None else inputs.places_of_functions(config)
        options = " ".join(
            f"--reward {shlex.quote(places.get(spec, spec))}" for spec in config.foreign
        )
        what = (
            "sends texts to" if missing[0].startswith(("http:", "https:")) else "runs the code of"
        )
        raise ConsentError(
            f"the reward of {run} {what} {places.get(missing[0], missing[0])}, which is done only "
            f"if you say so: give {options} if you trust it"
        )
