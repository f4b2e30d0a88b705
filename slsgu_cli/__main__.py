"""Entry point of the `slsgu` command."""


def main() -> None:
    """Run the command line."""
    from slsgu_cli.cli import app

    app(prog_name="slsgu")


if __name__ == "__main__":
    main()
