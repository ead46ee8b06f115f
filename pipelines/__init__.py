"""What runs when: definitions, jobs, schedules, sensors, bootstrap. Not here: what a step does."""
