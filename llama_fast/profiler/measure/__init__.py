"""What is generated and how long it takes: subjects, sides, clocks and the limits of the machine."""
