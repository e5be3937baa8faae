"""Auto-encoders of handwritten digits: the data, the nets and the judge of the demo, of tutorials and benchmarks.

``python -m pyro_wae.demo`` trains one and writes its pictures.
"""
