"""`python -m ppo_cli`."""

from ppo_cli.cli.app import main

if __name__ == "__main__":
    main()
