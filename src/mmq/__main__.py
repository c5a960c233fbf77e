"""`python -m mmq`: the same program as the `mmq` command."""

from mmq.cli.app import main

if __name__ == "__main__":
    main()
