"""The version of the whole project. Not read from what is installed: that takes longer than a picture."""

VERSION = "0.1.0"
