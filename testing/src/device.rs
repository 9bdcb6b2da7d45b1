//! The device under test.

use tch::{Device, Kind, Tensor};

/// CORRAL_TEST_DEVICE: cpu (the default) or cuda.
pub fn device() -> Device {
    match std::env::var("CORRAL_TEST_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => Device::Cpu,
        Ok("cuda") => {
            kernels::cuda::load()
                .and_then(|c| c.device_count())
                .expect("CORRAL_TEST_DEVICE=cuda needs a GPU");
            Device::Cuda(0)
        }
        Ok(other) => panic!("CORRAL_TEST_DEVICE={other}: it must be cpu or cuda"),
    }
}

/// A copy on the device under test.
pub fn put(t: &Tensor) -> Tensor {
    t.to_device(device()).copy()
}

/// A copy on the CPU in float64, for comparisons and oracles.
pub fn exact(t: &Tensor) -> Tensor {
    t.to_device(Device::Cpu).to_kind(Kind::Double).copy()
}
