"""`python -m pipeline` is the `illm` command."""

from pipeline.cli.app import main

if __name__ == "__main__":
    main()
