//! The device under test.

use tch::{Device, Kind, Tensor};

/// CORRAL_TEST_DEVICE: cpu (the default), cuda, or emulated: the CPU with the GPU's kernels, see [`crate::emulator`].
pub fn device() -> Device {
    match std::env::var("CORRAL_TEST_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => Device::Cpu,
        Ok("cuda") => {
            kernels::cuda::load()
                .and_then(|c| c.device_count())
                .expect("CORRAL_TEST_DEVICE=cuda needs a GPU");
            Device::Cuda(0)
        }
        Ok("emulated") => {
            crate::emulator::install();
            Device::Cpu
        }
        Ok(other) => panic!("CORRAL_TEST_DEVICE={other}: it must be cpu, cuda or emulated"),
    }
}

/// Whether the operations under test are a GPU's, on one or emulated.
pub fn gpu_path() -> bool {
    device() != Device::Cpu || emulated()
}

/// Whether CPU tensors take the GPU's path.
pub fn emulated() -> bool {
    device() == Device::Cpu && kernels::cuda::emulator::is_installed()
}

/// A copy on the device under test.
pub fn put(t: &Tensor) -> Tensor {
    t.to_device(device()).copy()
}

/// A copy on the CPU in float64, for comparisons and oracles.
pub fn exact(t: &Tensor) -> Tensor {
    t.to_device(Device::Cpu).to_kind(Kind::Double).copy()
}
