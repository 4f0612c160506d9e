"""The providers: this project's functions and their peers, by what they compute."""
