"""Options every test may ask for."""


def pytest_addoption(parser):
    parser.addoption(
        "--rewrite",
        action="store_true",
        help="accept the transcripts in tests/scenarios as they come out now",
    )
