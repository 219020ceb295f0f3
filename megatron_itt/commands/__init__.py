"""Commands of `itt`, one file each: arguments, one call of the package, output. No other module imports them."""
