//! Numbers that lie on a device, read together: every read waits until the device has done all that it was given.

use tch::{Device, Kind, Tensor};

use crate::error::Result;

/// The values of scalars, in one copy.
pub fn read_scalars(scalars: &[Tensor]) -> Result<Vec<f64>> {
    if scalars.is_empty() {
        return Ok(Vec::new());
    }
    let wide: Vec<Tensor> = scalars.iter().map(|t| t.to_kind(Kind::Double).view([1])).collect();
    Ok(Vec::try_from(Tensor::f_cat(&wide, 0)?.to_device(Device::Cpu))?) // host sync
}

/// The sums over all elements of some tensors of one device, in float64, in one copy; none of them is differentiated.
pub fn sums_of<const N: usize>(terms: [Tensor; N]) -> [f64; N] {
    let sums = terms.map(|t| t.detach().sum(Kind::Double).view([1]));
    let all = Tensor::cat(&sums, 0).to_device(Device::Cpu); // host sync
    std::array::from_fn(|i| all.double_value(&[i as i64]))
}
