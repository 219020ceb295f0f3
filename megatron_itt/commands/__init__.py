"""The commands of `itt`, one file each: arguments, one call of the package, what is printed. No other module imports them."""
