def moving_average(values, window):
    """Average of the last `window` values at each position."""
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    averages, total = [], 0.0
    for i, value in enumerate(values):
        total += value
        if i >= window:
            total -= values[i - window]
        averages.append(total / min(i + 1, window))

    return averages
