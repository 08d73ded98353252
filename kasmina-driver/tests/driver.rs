//! The crate against no driver and against a made-up one, each in a process of its own because the
//! library is opened once in the life of a process.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{self, Command};
use std::sync::OnceLock;
use std::{fs, ptr};

use kasmina_driver::cust_raw::{self, CUresult};
use kasmina_driver::{DriverVersion, Origin, RawError, Unavailable, check, last_error};

/// Set in the child processes.
const CHILD: &str = "KASMINA_DRIVER_TEST_CHILD";

/// Runs `body`, which belongs to the test called `test`, in a new process with these variables.
fn in_child(test: &str, variables: &[(&str, OsString)], body: impl FnOnce()) {
    if env::var_os(CHILD).is_some() {
        return body();
    }
    let output = Command::new(env::current_exe().expect("the path of this test"))
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, "1")
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .output()
        .expect("this test can be started again");
    assert!(
        output.status.success() && String::from_utf8_lossy(&output.stdout).contains("1 passed"),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn without_driver(test: &str, body: impl FnOnce()) {
    in_child(test, &[("KASMINA_LIBCUDA", "/nonexistent/libcuda.so.1".into())], body);
}

fn with_fake_driver(test: &str, settings: &[(&'static str, u32)], body: impl FnOnce()) {
    if env::var_os(CHILD).is_some() {
        return body();
    }
    let mut variables = vec![("KASMINA_LIBCUDA", fake_driver().into_os_string())];
    variables.extend(settings.iter().map(|(name, value)| (*name, value.to_string().into())));
    in_child(test, &variables, body);
}

/// The path of the made-up driver, compiled once by each process that asks.
fn fake_driver() -> PathBuf {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake_driver/driver.rs");
        // Renamed into place, so that test processes running side by side see it whole or not at
        // all.
        let unfinished = folder.join(format!("libfake_driver.{}.so", process::id()));
        let status = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
            .args(["--edition=2024", "--crate-type=cdylib", "--crate-name=fake_driver", "-o"])
            .arg(&unfinished)
            .arg(source)
            .status()
            .expect("rustc can be started; set RUSTC to its path");
        assert!(status.success(), "the made-up driver does not compile");
        let path = folder.join("libfake_driver.so");
        fs::rename(&unfinished, &path).expect("the made-up driver can be renamed");
        path
    })
    .clone()
}

fn synchronize() -> Result<(), RawError> {
    // SAFETY: takes no argument.
    check("cuCtxSynchronize", unsafe { kasmina_driver::cuCtxSynchronize() })
}

#[test]
fn without_a_library_init_says_no_driver_and_what_to_install() {
    without_driver("without_a_library_init_says_no_driver_and_what_to_install", || {
        let unavailable = kasmina_driver::init().unwrap_err();
        assert!(matches!(unavailable, Unavailable::NoDriver { .. }), "{unavailable:?}");
        let message = unavailable.to_string();
        assert!(message.contains("/nonexistent/libcuda.so.1"), "{message}");
        assert!(message.contains("install the NVIDIA driver"), "{message}");
        assert_eq!(kasmina_driver::device_count(), Err(unavailable));
    });
}

#[test]
fn without_a_library_calls_fail_with_a_distinct_origin() {
    without_driver("without_a_library_calls_fail_with_a_distinct_origin", || {
        let error = synchronize().unwrap_err();
        assert_eq!((error.code, error.origin), (3, Origin::NoLibrary));
        assert!(error.to_string().contains("cannot open"), "{error}");
    });
}

#[test]
fn cust_reports_and_prints_a_missing_driver() {
    without_driver("cust_reports_and_prints_a_missing_driver", || {
        let error = cust::init(cust::CudaFlags::empty()).unwrap_err();
        assert_eq!(error, cust::error::CudaError::NotInitialized);
        assert!(error.to_string().contains("not initialised"));
        assert_eq!(last_error().map(|error| error.origin), Some(Origin::NoLibrary));
    });
}

#[test]
fn a_driver_without_gpu_is_no_device() {
    let settings = [("FAKE_CUDA_INIT", 100)];
    with_fake_driver("a_driver_without_gpu_is_no_device", &settings, || {
        assert_eq!(kasmina_driver::init(), Err(Unavailable::NoDevice));
        assert_eq!(kasmina_driver::device_count(), Err(Unavailable::NoDevice));
    });
}

#[test]
fn a_device_count_of_zero_is_no_device() {
    let settings = [("FAKE_CUDA_DEVICES", 0)];
    with_fake_driver("a_device_count_of_zero_is_no_device", &settings, || {
        assert_eq!(kasmina_driver::init(), Ok(DriverVersion::new(13, 0)));
        assert_eq!(kasmina_driver::device_count(), Err(Unavailable::NoDevice));
    });
}

#[test]
fn the_toolkits_stub_library_is_no_driver() {
    let settings = [("FAKE_CUDA_INIT", 34)];
    with_fake_driver("the_toolkits_stub_library_is_no_driver", &settings, || {
        let unavailable = kasmina_driver::init().unwrap_err();
        assert!(matches!(unavailable, Unavailable::NoDriver { .. }), "{unavailable:?}");
        assert!(unavailable.to_string().contains("stand-in"), "{unavailable}");
    });
}

#[test]
fn a_driver_that_does_not_start_says_why() {
    let settings = [("FAKE_CUDA_INIT", 803)];
    with_fake_driver("a_driver_that_does_not_start_says_why", &settings, || {
        let unavailable = kasmina_driver::init().unwrap_err();
        assert!(
            matches!(unavailable, Unavailable::Failed { source } if source.code == 803),
            "{unavailable:?}"
        );
        assert!(unavailable.to_string().contains("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"));
    });
}

#[test]
fn a_driver_older_than_the_ptx_names_both_versions() {
    let settings = [("FAKE_CUDA_VERSION", 11_020), ("FAKE_CUDA_DEVICES", 2)];
    with_fake_driver("a_driver_older_than_the_ptx_names_both_versions", &settings, || {
        let driver = kasmina_driver::init().unwrap();
        assert_eq!(kasmina_driver::device_count(), Ok(2));
        assert_eq!(driver.require_ptx(7, 2), Ok(()));
        let refused = driver.require_ptx(8, 0).unwrap_err();
        assert_eq!(refused, Unavailable::DriverTooOld { driver: (11, 2), required: (12, 0) });
        assert!(refused.to_string().contains("11.2") && refused.to_string().contains("12.0"));
        let unknown = driver.require_ptx(10, 0).unwrap_err();
        assert_eq!(unknown, Unavailable::UnknownPtx { version: (10, 0) });
    });
}

#[test]
fn a_function_the_driver_lacks_fails_alone() {
    with_fake_driver("a_function_the_driver_lacks_fails_alone", &[], || {
        let config = kasmina_driver::CUlaunchConfig::new([1; 3], [1; 3], 0, ptr::null_mut());
        // SAFETY: the made-up driver has no such function, so no argument is looked at.
        let result = unsafe {
            kasmina_driver::cuLaunchKernelEx(
                &raw const config,
                ptr::null_mut(),
                ptr::null_mut(),
                ptr::null_mut(),
            )
        };
        let error = check("cuLaunchKernelEx", result).unwrap_err();
        assert_eq!((error.code, error.origin), (500, Origin::NoSymbol));
        assert!(error.to_string().contains("no cuLaunchKernelEx; update"), "{error}");
        assert_eq!(synchronize(), Ok(()));
    });
}

#[test]
fn a_code_newer_than_cust_reaches_it_as_unknown_and_us_as_it_is() {
    let settings = [("FAKE_CUDA_SYNCHRONIZE", 912)];
    let test = "a_code_newer_than_cust_reaches_it_as_unknown_and_us_as_it_is";
    with_fake_driver(test, &settings, || {
        // SAFETY: takes no argument. The declaration is the one `cust` calls.
        let result = unsafe { cust_raw::cuCtxSynchronize() };
        assert_eq!(result, CUresult::CUDA_ERROR_UNKNOWN);
        let kept = RawError { call: "cuCtxSynchronize", code: 912, origin: Origin::Driver };
        assert_eq!(last_error(), Some(kept));
        assert_eq!(synchronize(), Err(kept));
        assert!(kept.to_string().contains("CUDA_ERROR_INVALID_CLUSTER_SIZE (912)"), "{kept}");
    });
}

#[test]
fn arguments_arrive_in_order() {
    with_fake_driver("arguments_arrive_in_order", &[], || {
        // SAFETY: the made-up driver compares the arguments and dereferences none.
        let result = unsafe {
            cust_raw::cuMemsetD32Async(0x7000_0000_1000, 0xdead_beef, 1 << 40, ptr::null_mut())
        };
        assert_eq!(result, CUresult::CUDA_SUCCESS);
    });
}
