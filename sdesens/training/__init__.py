"""Training of diffusion models: data, networks, a trainer that resumes to the bit, samples, steering and a report."""
