"""What a release changes; tests write this file anew."""

NAME = "one"
