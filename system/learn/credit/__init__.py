"""Credit: from the statistics of a batch of trees to advantages per leaf or per node."""
