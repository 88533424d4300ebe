"""Entry of the Space; the page itself is `geobased.demo.generation`, which `geobased demo generation` serves as well."""

from geobased.demo.generation import main

if __name__ == "__main__":
    main()
