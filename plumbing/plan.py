def show(flags): pass
