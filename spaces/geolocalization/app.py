"""Entry of the Space; the page is `geobased.demo.geolocalization`, which `geobased demo geolocalization` serves as well."""

from geobased.demo.geolocalization import main

if __name__ == "__main__":
    main()
