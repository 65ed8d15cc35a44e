"""The driver half: never active."""

from triton.backends.driver import DriverBase


class InterpretedDriver(DriverBase):
    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("kernels run interpreted")

    def get_current_target(self):
        raise NotImplementedError("kernels run interpreted")

    def get_active_torch_device(self):
        raise NotImplementedError("kernels run interpreted")

    def get_benchmarker(self):
        raise NotImplementedError("kernels run interpreted")
