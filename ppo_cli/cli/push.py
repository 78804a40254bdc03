"""`ppo-cli push`."""

from typing import Annotated

import typer

from ppo_cli.cli import completion


def push(
    run: Annotated[
        str, typer.Argument(metavar="RUN", autocompletion=completion.runs, help="Run directory.")
    ],
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Model repository on the hub.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a private repository. Default: your account's.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="BRANCH", help="Branch to commit to. Default: main."),
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", metavar="TEXT", help="Message of the commit.")
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Add a commit to a repository that has files.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be uploaded, upload nothing.")
    ] = False,
) -> int:
    """Upload a run's model, card and metrics to the hub.

    Examples:
        ppo-cli push ppo-good me/gpt2-cheerful --dry-run
        ppo-cli push ppo-good me/gpt2-cheerful --private
    """
    from ppo_cli.cli.console import console, note, print_tables, write_result
    from ppo_cli.reporting.tables import upload_table
    from ppo_cli.training.run_directory import RunDirectory
    from ppo_cli.training.sharing import shared_files, with_license
    from ppo_cli.utils.hub_upload import check_repo_id, check_token, upload

    check_repo_id(repository)
    directory = RunDirectory.existing(run)
    directory.lock.check()
    files, stay = shared_files(directory, repository)
    target = repository if revision is None else f"{repository}, branch {revision}"
    table = upload_table({file.name: file.size for file in files}, stay, target)
    if dry_run:
        print_tables([table])
        note("nothing was uploaded")
        return 0
    check_token()
    console(stderr=True).print(table)
    url = upload(
        repository,
        {file.name: file.content for file in with_license(files)},
        message=message or f"Upload {directory.path.absolute().name} with ppo-cli",
        revision=revision,
        private=private,
        update=update,
    )
    write_result(url, None)
    return 0
